"""Networks of pruned layers, through the whole backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_nets import RandomNet, calls_text, captured, compare, net, plan_of_program
from torch import Tensor, nn
from torch.nn import functional

from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.lowering import place_sparse
from shohin.backends.tvm.target import CpuTarget
from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.prune import Prune


def _pruned(module: nn.Module, *shapes: tuple[int, ...], batch: int, density: float) -> Program:
    program = captured(module, *shapes, batch=batch)
    return Prune(density=density).run(program, Context()).program


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates by which sparse kernels win wherever there is one."""
    monkeypatch.setattr(place_sparse, "_SPARSE_COST", 1e-9)
    monkeypatch.setattr(place_sparse, "_ELEMENTS_A_MILLISECOND", 1e30)


def _check(
    module: nn.Module, *shapes: tuple[int, ...], batch: int, density: float = 0.3, threads: int = 2
) -> Program:
    program = _pruned(module, *shapes, batch=batch, density=density)
    binary = compile_program(program, CpuTarget(threads=threads), batch)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        expected = program.module(*inputs)
    for _ in range(2):
        compare(binary(*inputs), expected, 1e-5)
    return program


def _kernels(program: Program, batch: int) -> list[str]:
    plan = plan_of_program(program, batch, CpuTarget("x86-64-v4"))
    return [line.split()[0] for line in calls_text(plan).splitlines()]


def _residual(s: Any, x: Tensor) -> Tensor:
    first = functional.relu(s.a(x))
    second = functional.relu(s.b(first))
    return functional.relu(s.c(second) + first)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("batch", [1, 3])
def test_planes_stay_between_sparse_layers(batch: int) -> None:
    module = net(
        _residual,
        a=nn.Conv2d(3, 20, 3, padding=1),
        b=nn.Conv2d(20, 24, 3, padding=1),
        c=nn.Conv2d(24, 20, 3, padding=1),
    )
    program = _check(module, (3, 13, 11), batch=batch)
    assert _kernels(program, batch) == [
        "to_planes",
        "sparse_conv2d",
        "exchange",
        "sparse_conv2d",
        "exchange",
        "sparse_conv2d",
        "from_planes",
    ]


def _mixed(s: Any, x: Tensor) -> Tensor:
    x = functional.relu(s.a(x))
    x = functional.max_pool2d(x, 2)
    x = functional.relu(s.b(x))
    x = s.c(x)
    return s.d(functional.adaptive_avg_pool2d(x, 2).flatten(1))


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_pools_strides_and_heads(batch: int) -> None:
    module = net(
        _mixed,
        a=nn.Conv2d(3, 16, 5, padding=2),
        b=nn.Conv2d(16, 33, 3, stride=2, padding=1),
        c=nn.Conv2d(33, 18, 1),
        d=nn.Linear(72, 10),
    )
    _check(module, (3, 20, 18), batch=batch)


def _stages(s: Any, x: Tensor) -> Tensor:
    x = functional.max_pool2d(functional.relu(s.a(x)), 2)
    x = functional.avg_pool2d(functional.relu(s.b(x)), 2)
    return s.c(x)


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("batch", [1, 2])
def test_pools_between_planes(batch: int) -> None:
    module = net(
        _stages,
        a=nn.Conv2d(3, 8, 3, padding=1),
        b=nn.Conv2d(8, 12, 3, padding=1),
        c=nn.Conv2d(12, 7, 3, padding=1),
    )
    program = _check(module, (3, 64, 64), batch=batch)
    kernels = _kernels(program, batch)
    assert kernels.count("plane_pool") == 2
    assert kernels.count("to_planes") == 1


def _fire(s: Any, x: Tensor) -> Tensor:
    x = functional.relu(s.a(x))
    return s.d(torch.cat([functional.relu(s.b(x)), functional.relu(s.c(x))], 1))


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("batch", [1, 2])
def test_concatenations(batch: int) -> None:
    module = net(
        _fire,
        a=nn.Conv2d(5, 16, 1),
        b=nn.Conv2d(16, 32, 1),
        c=nn.Conv2d(16, 32, 3, padding=1),
        d=nn.Conv2d(64, 7, 3, padding=1),
    )
    program = _check(module, (5, 12, 12), batch=batch)
    kernels = _kernels(program, batch)
    assert kernels.count("to_planes") == 1
    assert kernels.count("concat") == 1


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_fully_connected(batch: int, density: float) -> None:
    module = net(
        lambda s, x: s.b(functional.gelu(s.a(x))),
        a=nn.Linear(90, 70),
        b=nn.Linear(70, 11, bias=False),
    )
    program = _check(module, (90,), batch=batch, density=density)
    assert any(name.startswith(("sparse", "block")) for name in _kernels(program, batch))


@pytest.mark.usefixtures("always_sparse")
def test_a_flattened_image_is_read_in_its_own_order() -> None:
    module = net(
        lambda s, x: s.b(functional.relu(s.a(x)).flatten(1)),
        a=nn.Conv2d(3, 20, 3, groups=1, stride=2),
        b=nn.Linear(20 * 25, 10),
    )
    _check(module, (3, 11, 11), batch=1)
    _check(module, (3, 11, 11), batch=2)


@pytest.mark.usefixtures("always_sparse")
def test_rows_of_weights_that_share_inputs_are_blocks() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Linear(64, 64))
    with torch.no_grad():
        module.a.weight *= (torch.arange(64) % 4 == 0).float()  # type: ignore[operator, union-attr]
    program = _check(module, (64,), batch=1, density=0.25)
    assert _kernels(program, 1) == ["block_linear"]


def test_grouped_convolutions_stay_dense_and_say_so() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(32, 32, 3, groups=2))
    program = _check(module, (32, 8, 8), batch=1)
    plan = plan_of_program(program, 1, CpuTarget("x86-64-v4"))
    notes = [call.note for call in plan.calls if call.note]
    assert notes == ["dense: a grouped convolution has no sparse kernel"]


def test_what_does_not_pay_stays_dense() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(32, 32, 3))
    program = _check(module, (32, 8, 8), batch=1, density=0.9)
    assert "sparse_conv2d" not in _kernels(program, 1)
    plan = plan_of_program(program, 1, CpuTarget("x86-64-v4"))
    notes = [call.note for call in plan.calls if call.note]
    assert len(notes) == 1
    assert notes[0].startswith("estimated: dense ")


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int) -> None:
    module = RandomNet(seed).eval()
    _check(module, (module.channels, 12, 12), batch=1 + seed % 3, density=0.4)


def test_both_times_reach_the_binary() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(32, 32, 3, padding=1))
    program = _pruned(module, (32, 14, 14), batch=1, density=0.05)
    binary = compile_program(replace(program), CpuTarget(tune="quick"), 1)
    notes = [step.note for step in binary.info.steps if step.note]
    assert notes
    assert all(note.startswith("measured: dense ") and "sparse" in note for note in notes)
