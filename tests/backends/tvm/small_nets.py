"""Small networks, and texts of what the backend makes of them."""

import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.lowering.calls import Plan
from shohin.backends.tvm.lowering.lower import HANDLERS, lower, select
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Operation, Operations
from shohin.backends.tvm.lowering.select import Selector
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.errors import ShohinWarning
from shohin.ir.capture import capture
from shohin.ir.program import Program


class Net(nn.Module):
    """A function of inputs and of layers given by name."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def net(function: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> nn.Module:
    """A network in inference mode whose weights depend on nothing but its layers."""
    module = Net(function, **layers).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return module


def captured(module: nn.Module, *shapes: tuple[int, ...], batch: int = 2) -> Program:
    """The program of a network whose inputs have these sizes behind the batch."""
    examples = tuple(torch.randn(batch, *shape) for shape in shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShohinWarning)
        return capture(module, examples, name="net")


def check(
    module: nn.Module,
    *shapes: tuple[int, ...],
    batch: int = 2,
    threads: int = 2,
    tolerance: float = 1e-5,
    arch: str = "native",
) -> None:
    """Compile a network and compare every output with PyTorch's.

    Args:
        module: the network.
        shapes: sizes of its inputs behind the batch.
        batch: the batch.
        threads: threads to run on.
        tolerance: largest difference, as a share of an output's largest number.
        arch: what to compile for.
    """
    program = captured(module, *shapes, batch=batch)
    binary = compile_program(program, CpuTarget(arch, threads), batch)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    kept = [tensor.clone() for tensor in inputs]
    with torch.no_grad():
        expected = module(*inputs)
    for _ in range(2):
        found = binary(*inputs)
        compare(found, expected, tolerance)
    for tensor, before in zip(inputs, kept, strict=True):
        assert torch.equal(tensor, before)


def compare(found: Any, expected: Any, tolerance: float) -> None:
    """Compare outputs: floats within a share of the largest number, the others exactly."""
    pairs = zip(_flat(found), _flat(expected), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        if not other.dtype.is_floating_point:
            assert torch.equal(one, other)
        elif other.numel():
            scale = float(other.abs().max()) or 1.0
            difference = float((one.double() - other.double()).abs().max())
            assert difference <= tolerance * scale, difference / scale


def _flat(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def selected(module: nn.Module, *shapes: tuple[int, ...], batch: int = 2) -> str:
    """The operations before fusion, one a line."""
    program = captured(module, *shapes, batch=batch)
    return _text(Selector(program, batch, HANDLERS).select())


def fused(module: nn.Module, *shapes: tuple[int, ...], batch: int = 2) -> str:
    """The operations after fusion, one a line."""
    return _text(select(captured(module, *shapes, batch=batch), batch))


def _text(operations: Operations) -> str:
    lines = [_operation_text(op) for op in operations.operations]
    outputs = ", ".join(value.name for value in operations.outputs)
    return "\n".join([*lines, f"return {outputs}"])


_HIDDEN = {"output", "label", "steps", "x", "a", "b", "parts", "weight", "bias"}
_HIDDEN |= {"module", "values", "results", "nodes"}


def _operation_text(op: Operation) -> str:
    inputs = ", ".join(value.name for value in op.inputs)
    fields = {k: v for k, v in vars(op).items() if k not in _HIDDEN}
    options = "".join(f" {key}={_plain(value)}" for key, value in fields.items() if value)
    outputs = ", ".join(value.name for value in op.outputs)
    steps = "".join(f" + {_step_text(step)}" for step in op.steps)
    return f"{outputs} = {type(op).__name__}({inputs}){options}{steps}"


def _plain(value: object) -> str:
    return str(value).replace(" ", "")


def _step_text(fused_step: Any) -> str:
    step = fused_step.step
    given = [f"{number:g}" for number in step.constants]
    if fused_step.operand is not None:
        given.append(fused_step.operand.name)
    return f"{step.kind}({', '.join(given)})" if given else str(step.kind)


def planned(
    module: nn.Module, *shapes: tuple[int, ...], batch: int = 2, target: CpuTarget | None = None
) -> str:
    """The kernel calls, one a line: what each reads, and what it writes behind the arrow."""
    return calls_text(plan_of(module, *shapes, batch=batch, target=target))


def plan_of(
    module: nn.Module, *shapes: tuple[int, ...], batch: int = 2, target: CpuTarget | None = None
) -> Plan:
    """The plan of a network."""
    program = captured(module, *shapes, batch=batch)
    return plan_of_program(program, batch, target or CpuTarget("x86-64-v4"))


def plan_of_program(program: Program, batch: int, target: CpuTarget) -> Plan:
    """The plan of a program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constants.bin"
        tuner = Tuner(target)
        return lower(program, tuner, batch, path, lambda done, total, label: None)


def calls_text(plan: Plan) -> str:
    """See `planned`."""
    names: dict[int, str] = {}

    def name(place: Placement) -> str:
        buffer = place.buffer
        if buffer.kind == "arena":
            text = names.setdefault(id(buffer), f"t{len(names)}")
        else:
            text = {"input": "in", "output": "out", "constant": "c"}[buffer.kind]
            text += "" if buffer.kind == "constant" else str(buffer.index)
        return f"{text}+{place.offset}" if place.offset else text

    lines = []
    for call in plan.calls:
        *reads, write = [name(place) for place in call.arguments]
        family = getattr(call.kernel, "family", "region")
        lines.append(f"{family} {' '.join(read for read in reads if read != 'c')} -> {write}")
    return "\n".join(lines)


class RandomNet(nn.Module):
    """Random layers on `[batch, channels, 12, 12]`, then a head; every size depends on the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        self.channels = choose.choice([1, 3, 5, 16, 20])
        self.layers = nn.ModuleList()
        self.ways: list[str] = []
        channels, side = self.channels, 12
        for _ in range(choose.randint(2, 6)):
            way = choose.choice(["plain", "plain", "add", "cat", "pad", "slice", "pool", "scale"])
            wider = choose.choice([4, 16, 20, 32, 50])
            if way == "pool" and side < 4:
                way = "plain"
            layer: nn.Module
            if way == "plain":
                layer, channels = _convolution(choose, channels, wider), wider
            elif way == "add":
                layer = _convolution(choose, channels, channels)
            elif way == "cat":
                layer, channels = _convolution(choose, channels, wider), channels + wider
            elif way == "pool":
                layer, side = _pool(choose), side // 2
            elif way == "slice" and channels > 4:
                layer, channels = nn.Identity(), channels - 3
            elif way == "scale":
                layer = nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU())
            else:
                way, layer, side = "pad", nn.ZeroPad2d((1, 0, 2, 1)), side
                layer = nn.Sequential(layer, nn.Conv2d(channels, channels, (4, 2)))
            self.layers.append(layer)
            self.ways.append(way)
        if choose.random() < 0.5:
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7))
        else:
            self.head = nn.Sequential(
                nn.Flatten(), nn.Linear(channels * side * side, 33), nn.ReLU(), nn.Linear(33, 5)
            )

    def forward(self, x: Tensor) -> Tensor:
        for layer, way in zip(self.layers, self.ways, strict=True):
            if way == "add":
                x = torch.relu(layer(x) + x)
            elif way == "cat":
                x = torch.cat([x, layer(x)], 1)
            elif way == "slice":
                x = x[:, 1:-2] * 1.5
            else:
                x = layer(x)
        result: Tensor = self.head(x)
        return result


def _convolution(choose: random.Random, channels: int, filters: int) -> nn.Module:
    size = choose.choice([1, 3, 3, 5])
    groups = choose.choice(
        [g for g in (1, 1, 2, 4, 5, channels) if not (channels % g or filters % g)]
    )
    dilation = choose.choice([1, 1, 2])
    layers: list[nn.Module] = [
        nn.Conv2d(
            channels,
            filters,
            size,
            padding=dilation * (size // 2),
            dilation=dilation,
            groups=groups,
            bias=choose.random() < 0.5,
        )
    ]
    if choose.random() < 0.5:
        layers.append(nn.BatchNorm2d(filters))
    layers.append(choose.choice([nn.ReLU(), nn.ReLU6(), nn.Identity(), nn.Hardswish(), nn.GELU()]))
    return nn.Sequential(*layers)


def _pool(choose: random.Random) -> nn.Module:
    return choose.choice(
        [
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        ]
    )
