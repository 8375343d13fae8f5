"""Convolutions that are planned together with the 1 x 1 convolution that reads them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from convolutions import Layer, exactly
from emulated import EMULATED, run_emulated
from harness import Bounded, apply_steps
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_nets import calls_text, captured, compare, net
from torch import Tensor, nn
from torch.nn import functional

import shohin
from shohin.backends.base import Artifact
from shohin.backends.tvm import compile as compiling
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_pair import ConvPair
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.lowering.calls import KernelCall, Plan
from shohin.backends.tvm.lowering.fuse import fuse
from shohin.backends.tvm.lowering.lower import HANDLERS, lower, select
from shohin.backends.tvm.lowering.operations import Convolution, ConvolutionPair, Operations
from shohin.backends.tvm.lowering.place_pairs import pair_convolutions
from shohin.backends.tvm.lowering.select import Selector
from shohin.backends.tvm.processor import Tune
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning import tuner as tuning
from shohin.backends.tvm.tuning.cache import TuningCache
from shohin.backends.tvm.tuning.tuner import Tuner

_RELU = Step("relu")
_RESIDUAL = Step("add", operand="full")

Function: TypeAlias = Callable[..., Any]
Milliseconds: TypeAlias = Callable[[Kernel], float]
Pretend: TypeAlias = Callable[[Milliseconds], list[Kernel]]


def _layers(**others: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(16, 20, 3, padding=1), "b": nn.Conv2d(20, 16, 1), **others}


def _kinds(function: Function, **layers: nn.Module) -> list[str]:
    """Kinds of the operations, in order."""
    program = captured(net(function, **layers), (16, 8, 8), batch=1)
    return [type(op).__name__ for op in select(program, 1).operations]


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(16, 20, 3),
        nn.Conv2d(16, 20, 1),
        nn.Conv2d(16, 20, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1), bias=False),
    ],
)
def test_a_pair(first: nn.Module) -> None:
    assert _kinds(lambda s, x: s.b(s.a(x)), **_layers(a=first)) == ["ConvolutionPair"]


def test_steps_of_the_second_are_those_of_the_pair() -> None:
    module = net(lambda s, x, y: (s.b(s.a(x)) + y).relu(), **_layers())
    (pair,) = select(captured(module, (16, 8, 8), (16, 8, 8)), 2).operations
    assert isinstance(pair, ConvolutionPair)
    assert [step.step.kind for step in pair.steps] == ["add", "relu"]
    assert [value.name for value in pair.reads] == ["inputs_0", "inputs_1"]


def test_a_pair_runs_where_the_second_did() -> None:
    def late(s: Any, x: Tensor) -> Any:
        middle = s.a(x)
        return s.b(middle) + functional.max_pool2d(x, 3, 1, 1)

    assert _kinds(late, **_layers()) == ["Pooling", "ConvolutionPair"]


def test_a_convolution_is_in_one_pair() -> None:
    layers = _layers(c=nn.Conv2d(16, 24, 1), d=nn.Conv2d(24, 16, 1))
    three = _kinds(lambda s, x: s.c(s.b(s.a(x))), **layers)
    assert three == ["ConvolutionPair", "Convolution"]
    four = _kinds(lambda s, x: s.d(s.c(s.b(s.a(x)))), **layers)
    assert four == ["ConvolutionPair", "ConvolutionPair"]


def _read_twice(s: Any, x: Tensor) -> Any:
    middle = s.a(x)
    return s.b(middle), s.c(middle)


def _read_as_operand(s: Any, x: Tensor) -> Any:
    middle = s.a(x)
    return s.b(middle) + middle


def _returned(s: Any, x: Tensor) -> Any:
    middle = s.a(x)
    return s.b(middle), middle


_APART: dict[str, tuple[Function, dict[str, nn.Module]]] = {
    "read twice": (_read_twice, {"c": nn.Conv2d(20, 16, 1)}),
    "read as an operand": (_read_as_operand, {"b": nn.Conv2d(20, 20, 1)}),
    "an output": (_returned, {}),
    "activation between": (lambda s, x: s.b(s.a(x).relu()), {}),
    "normalised between": (lambda s, x: s.b(s.n(s.a(x))), {"n": nn.BatchNorm2d(20)}),
    "cut between": (lambda s, x: s.b(s.a(x)[:, :, 1:]), {}),
    "pooled between": (lambda s, x: s.b(functional.max_pool2d(s.a(x), 2)), {}),
    **{
        f"second {name}": (lambda s, x: s.b(s.a(x)), {"b": second})
        for name, second in {
            "strided": nn.Conv2d(20, 16, 1, stride=(1, 2)),
            "padded": nn.Conv2d(20, 16, 1, padding=(0, 1)),
            "3x3": nn.Conv2d(20, 16, 3),
            "1x2": nn.Conv2d(20, 16, (1, 2)),
            "grouped": nn.Conv2d(20, 16, 1, groups=2),
            "depthwise": nn.Conv2d(20, 20, 1, groups=20),
        }.items()
    },
    "first grouped": (lambda s, x: s.b(s.a(x)), {"a": nn.Conv2d(16, 20, 3, groups=2)}),
    "first depthwise": (
        lambda s, x: s.b(s.a(x)),
        {"a": nn.Conv2d(16, 16, 3, groups=16), "b": nn.Conv2d(16, 16, 1)},
    ),
}


@pytest.mark.parametrize("name", _APART)
def test_what_is_no_pair(name: str) -> None:
    function, layers = _APART[name]
    kinds = _kinds(function, **_layers(**layers))
    assert "ConvolutionPair" not in kinds
    assert kinds.count("Convolution") >= 2


def _unpaired() -> Operations:
    program = captured(net(lambda s, x: s.b(s.a(x)), **_layers()), (16, 8, 8), batch=1)
    return fuse(Selector(program, 1, HANDLERS).select())


@pytest.mark.parametrize("sparse", [[0], [1], [0, 1]])
def test_sparse_convolutions_are_no_pair(sparse: list[int]) -> None:
    operations = _unpaired()
    assert len(pair_convolutions(operations).operations) == 1
    for index in sparse:
        convolution = operations.operations[index]
        assert isinstance(convolution, Convolution)
        convolution.sparse = True
    assert pair_convolutions(operations).operations == operations.operations


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Lets kernels take given times on a machine that runs all code; lists what was measured."""

    def start(milliseconds: Milliseconds) -> list[Kernel]:
        measured: list[Kernel] = []

        def measure(kernels: Sequence[Kernel], target: CpuTarget) -> list[float]:
            measured.extend(kernels)
            return [milliseconds(kernel) for kernel in kernels]

        monkeypatch.setattr(tuning, "measure_kernels", measure)
        monkeypatch.setattr(tuning, "host_runs", lambda processor: "")
        return measured

    return start


def _pairs_take(milliseconds: float) -> Milliseconds:
    """Times by which every other kernel takes one millisecond."""
    return lambda kernel: milliseconds if isinstance(kernel, ConvPair) else 1.0


def _planned(
    module: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    *,
    batch: int = 1,
    tune: Tune = "quick",
) -> Plan:
    tuner = Tuner(CpuTarget("x86-64-v3", tune=tune), TuningCache(folder))
    program = captured(module, shape, batch=batch)
    return lower(program, tuner, batch, folder / "constants.bin", lambda done, total, text: None)


def _convolutions(plan: Plan) -> list[KernelCall]:
    return [call for call in plan.calls if isinstance(call.kernel, (Conv2d, ConvPair))]


def _one_pair(**others: nn.Module) -> nn.Module:
    return net(lambda s, x: s.b(s.a(x)), **_layers(**others))


def test_a_faster_pair_is_one_kernel(pretend: Pretend, tmp_path: Path) -> None:
    pretend(_pairs_take(1.5))
    (call,) = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path))
    assert isinstance(call.kernel, ConvPair)
    assert call.note == "measured: one by one 2.000 ms, in one kernel 1.500 ms"
    assert call.label == "a: conv 3x3 16->20 8x8 + conv 1x1 20->16 8x8"
    assert call.macs == 64 * (20 * 16 * 9 + 16 * 20)
    assert call.extent == 8


@pytest.mark.parametrize("milliseconds", [2.0, 2.5])
def test_a_pair_that_is_not_faster_is_two(
    pretend: Pretend, tmp_path: Path, milliseconds: float
) -> None:
    pretend(_pairs_take(milliseconds))
    calls = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path))
    assert [call.kernel.family for call in calls] == ["conv2d", "conv2d"]
    assert [call.label for call in calls] == ["a: conv 3x3 16->20 8x8", "b: conv 1x1 20->16 8x8"]
    text = f"measured: one by one 2.000 ms, in one kernel {milliseconds:.3f} ms"
    assert [call.note for call in calls] == [text, text]


def test_nothing_measured_is_two_without_a_note(pretend: Pretend, tmp_path: Path) -> None:
    measured = pretend(_pairs_take(0.1))
    calls = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path, tune="off"))
    assert [call.kernel.family for call in calls] == ["conv2d", "conv2d"]
    assert [call.note for call in calls] == ["", ""]
    assert not measured


def test_what_does_not_fit_is_not_measured(pretend: Pretend, tmp_path: Path) -> None:
    measured = pretend(_pairs_take(0.1))
    wide = _one_pair(a=nn.Conv2d(16, 257, 1), b=nn.Conv2d(257, 16, 1))
    calls = _convolutions(_planned(wide, (16, 1, 64), tmp_path))
    assert [call.kernel.family for call in calls] == ["conv2d", "conv2d"]
    assert [call.note for call in calls] == ["", ""]
    assert not any(isinstance(kernel, ConvPair) for kernel in measured)


@pytest.mark.parametrize("pair", [0.1, 5.0])
def test_kernels_are_those_whose_times_were_compared(
    pretend: Pretend, tmp_path: Path, pair: float
) -> None:
    favourites = _planned(_one_pair(), (16, 8, 8), tmp_path, tune="off")
    tiles = {call.kernel.tile_text() for call in _convolutions(favourites)}
    both = "+".join(call.kernel.tile_text() for call in _convolutions(favourites))

    def milliseconds(kernel: Kernel) -> float:
        slow = 1.0 if kernel.tile_text() in {*tiles, both} else 0.25
        return slow * (pair if isinstance(kernel, ConvPair) else 1.0)

    pretend(milliseconds)
    calls = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path))
    assert len(calls) == (1 if pair < 1 else 2)
    assert not {*tiles, both} & {call.kernel.tile_text() for call in calls}
    text = f"measured: one by one 0.500 ms, in one kernel {pair / 4:.3f} ms"
    assert {call.note for call in calls} == {text}


def _joined() -> nn.Module:
    return net(
        lambda s, x: torch.cat([s.b(s.a(x)), s.d(s.c(x)).relu()], 1),
        a=nn.Conv2d(16, 20, 3, padding=1),
        b=nn.Conv2d(20, 32, 1),
        c=nn.Conv2d(16, 8, 1),
        d=nn.Conv2d(8, 20, 1),
    )


@pytest.mark.parametrize("milliseconds", [0.1, 5.0])
@pytest.mark.parametrize(("batch", "blocks"), [(1, 2), (3, 4)])
def test_pairs_write_into_a_concatenation(
    pretend: Pretend, tmp_path: Path, batch: int, blocks: int, milliseconds: float
) -> None:
    pretend(_pairs_take(milliseconds))
    plan = _planned(_joined(), (16, 4, 4), tmp_path, batch=batch)
    assert "concat" not in calls_text(plan)
    pairs = [call.kernel for call in plan.calls if isinstance(call.kernel, ConvPair)]
    found = [pair.second.output_blocks for pair in pairs]
    assert found == ([blocks, blocks] if milliseconds < 1 else [])


@pytest.fixture
def always_pairs(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Measurements by which pairs win, away from the user's own."""
    cache = TuningCache(tmp_path_factory.mktemp("tuning"))
    monkeypatch.setattr(compiling, "Tuner", lambda target: Tuner(target, cache))
    monkeypatch.setenv("SHOHIN_TUNE", "quick")
    pretend(_pairs_take(0.1))


def _compiled(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Any, int]:
    """What a compiled network gives, and how many pairs it is made of."""
    batch, *_ = inputs[0].shape
    program = captured(module, *(tuple(x.shape[1:]) for x in inputs), batch=batch)
    binary = shohin.compile(program, "cpu{threads=2}", batch=batch)
    return binary(*inputs), len(_pairs(binary))


def _pairs(binary: Artifact) -> list[str]:
    return [step.label for step in binary.info.steps if step.kernel.startswith("conv_pair ")]


def _inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _chain(s: Any, x: Tensor) -> Tensor:
    first = s.b(s.a(x)).relu()
    middle = s.c(first)
    second = (s.d(middle) + functional.max_pool2d(first, 3, 1, 1)).relu()
    return torch.cat([s.f(s.e(second)), s.h(s.g(second)).sigmoid()], 1)


def _network() -> nn.Module:
    """Pairs that read an input, each other and what is computed in between, and are joined."""
    return net(
        _chain,
        a=nn.Conv2d(3, 5, 3, padding=1, stride=2),
        b=nn.Conv2d(5, 20, 1),
        c=nn.Conv2d(20, 33, (3, 1), padding=(1, 0)),
        d=nn.Conv2d(33, 20, 1, bias=False),
        e=nn.Conv2d(20, 7, (1, 3), padding=(0, 1)),
        f=nn.Conv2d(7, 32, 1),
        g=nn.Conv2d(20, 18, 1),
        h=nn.Conv2d(18, 9, 1),
    )


@pytest.mark.usefixtures("always_pairs")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_of_pairs(batch: int) -> None:
    module, inputs = _network(), _inputs((batch, 3, 11, 14))
    found, pairs = _compiled(module, inputs)
    assert pairs == 4
    with torch.no_grad():
        compare(found, module(*inputs), tolerance=1e-5)


@pytest.mark.usefixtures("always_pairs")
@EMULATED
@pytest.mark.parametrize("target", ["arm{cpu=cortex-a53}", "armv7"])
def test_other_processors(target: str, tmp_path: Path) -> None:
    module, inputs = _network(), _inputs((1, 3, 11, 14))
    program = captured(module, (3, 11, 14), batch=1)
    assert len(_pairs(shohin.compile(program, target))) == 4
    with torch.no_grad():
        compare(run_emulated(program, target, inputs, tmp_path), module(*inputs), tolerance=1e-5)


@dataclass(frozen=True)
class _Drawn:
    """Two convolutions, what follows them, and images."""

    first: nn.Conv2d
    second: nn.Conv2d
    geometry: Geometry
    steps: tuple[Step, ...]
    images: list[Tensor]

    def module(self) -> nn.Module:
        return net(self._forward, a=self.first, b=self.second)

    def _forward(self, s: Any, x: Tensor, *operands: Tensor) -> Tensor:
        y: Tensor = s.b(s.a(x))
        for step in self.steps:
            y = y + operands[0] if step == _RESIDUAL else y.relu()
        return y

    def expected(self) -> Bounded:
        x, *operands = self.images
        middle = _layer(self.first, self.geometry).sums(exactly(x.numpy()))
        sums = _layer(self.second, Geometry(self.geometry.output_size, (1, 1))).sums(middle)
        return apply_steps(self.steps, sums, [image.double() for image in operands])


def _layer(conv: nn.Conv2d, geometry: Geometry) -> Layer:
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    return Layer(conv.weight.detach().numpy(), bias.detach().numpy(), geometry)


@st.composite
def _geometries(draw: st.DrawFn) -> Geometry:
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (3, 1), (1, 3), (5, 5)]))
    stride, dilation = (draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) for _ in range(2))
    down, right = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    height = max(1, dilation[0] * (kernel[0] - 1) + 1 - 2 * down) + draw(st.integers(0, 6))
    width = max(1, dilation[1] * (kernel[1] - 1) + 1 - 2 * right) + draw(st.integers(0, 16))
    return Geometry((height, width), kernel, stride, (down, down, right, right), dilation)


@st.composite
def _drawn(draw: st.DrawFn) -> _Drawn:
    geometry = draw(_geometries())
    channels, middle, filters = (draw(st.integers(1, 40)) for _ in range(3))
    first = nn.Conv2d(
        channels,
        middle,
        geometry.kernel,
        geometry.stride,
        (geometry.padding[0], geometry.padding[2]),
        geometry.dilation,
        bias=draw(st.booleans()),
    )
    second = nn.Conv2d(middle, filters, 1, bias=draw(st.booleans()))
    steps = draw(st.sampled_from([(), (_RELU,), (_RESIDUAL,), (_RESIDUAL, _RELU)]))
    batch = draw(st.integers(1, 3))
    shapes = [(batch, channels, *geometry.size), (batch, filters, *geometry.output_size)]
    images = _inputs(*(shapes if _RESIDUAL in steps else shapes[:1]))
    return _Drawn(first, second, geometry, steps, images)


@pytest.mark.usefixtures("always_pairs")
@given(_drawn())
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_pair(drawn: _Drawn) -> None:
    found, pairs = _compiled(drawn.module(), drawn.images)
    assert pairs == 1
    drawn.expected().check(found.numpy())
