"""Networks of pruned layers, through the whole backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness import Array
from small_nets import RandomNet, net, plan_of_program
from sparse_nets import check_pruned, kernel_names, pruned
from torch import Tensor, nn
from torch.nn import functional

from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.block_linear import BlockSparseLinear
from shohin.backends.tvm.lowering.lower import PLACERS, select
from shohin.backends.tvm.lowering.memory import ConstantFile
from shohin.backends.tvm.lowering.operations import Convolution
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning.tuner import Tuner


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
    program = check_pruned(module, (3, 13, 11), batch=batch)
    assert kernel_names(program, batch) == [
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
    check_pruned(module, (3, 20, 18), batch=batch)


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
    program = check_pruned(module, (3, 64, 64), batch=batch)
    kernels = kernel_names(program, batch)
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
    program = check_pruned(module, (5, 12, 12), batch=batch)
    kernels = kernel_names(program, batch)
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
    program = check_pruned(module, (90,), batch=batch, density=density)
    assert any(name.startswith(("sparse", "block")) for name in kernel_names(program, batch))


@pytest.mark.usefixtures("always_sparse")
def test_a_flattened_image_is_read_in_its_own_order() -> None:
    module = net(
        lambda s, x: s.b(functional.relu(s.a(x)).flatten(1)),
        a=nn.Conv2d(3, 20, 3, groups=1, stride=2),
        b=nn.Linear(20 * 25, 10),
    )
    check_pruned(module, (3, 11, 11), batch=1)
    check_pruned(module, (3, 11, 11), batch=2)


@pytest.mark.usefixtures("always_sparse")
def test_rows_of_weights_that_share_inputs_are_blocks() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Linear(64, 64))
    with torch.no_grad():
        module.a.weight *= (torch.arange(64) % 4 == 0).float()  # type: ignore[operator, union-attr]
    program = check_pruned(module, (64,), batch=1, density=0.25)
    assert kernel_names(program, 1) == ["block_linear"]


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("groups", [2, 32])
def test_grouped_convolutions_stay_dense_and_say_so(groups: int) -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(32, 32, 3, groups=groups))
    program = check_pruned(module, (32, 8, 8), batch=1)
    plan = plan_of_program(program, 1, CpuTarget("x86-64-v4"))
    notes = [call.note for call in plan.calls if call.note]
    assert notes == ["dense: a grouped convolution has no sparse kernel"]


@pytest.mark.usefixtures("always_sparse")
def test_grouped_convolutions_do_not_ask_for_planes() -> None:
    module = net(
        lambda s, x: s.b(functional.max_pool2d(s.a(x), 2)),
        a=nn.Conv2d(16, 32, 3, padding=1),
        b=nn.Conv2d(32, 32, 3, padding=1, groups=2),
    )
    program = check_pruned(module, (16, 64, 64), batch=1)
    names = kernel_names(program, 1)
    assert "exchange" not in names
    assert "plane_pool" not in names


def test_grouped_convolutions_write_into_a_concatenation() -> None:
    module = net(
        lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)),
        a=nn.Conv2d(32, 32, 3, groups=2),
        b=nn.Conv2d(32, 32, 3, groups=32),
        c=nn.Conv2d(64, 8, 1, groups=2),
    )
    assert "concat" not in kernel_names(check_pruned(module, (32, 8, 8), batch=2), 2)


def test_lists_are_packed_once_and_only_to_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    pack = BlockSparseLinear.pack

    def counted(kernel: BlockSparseLinear, weight: Array) -> dict[str, Array]:
        packed.append(kernel.entries)
        return pack(kernel, weight)

    monkeypatch.setattr(BlockSparseLinear, "pack", counted)
    program = pruned(net(lambda s, x: s.a(x), a=nn.Linear(256, 64)), (256,), batch=1, density=0.02)
    operations = select(program, 1)
    Planner(Tuner(CpuTarget()), ConstantFile(None), PLACERS).plan(operations)
    assert not packed
    assert kernel_names(program, 1) == ["block_linear"]
    assert len(packed) == 1


def test_changes_of_layout_for_readers_count() -> None:
    module = net(
        lambda s, x: s.c(s.b(functional.max_pool2d(s.a(x), 2))),
        a=nn.Conv2d(16, 32, 3, padding=1),
        b=nn.Conv2d(32, 48, 3, padding=1),
        c=nn.Conv2d(48, 32, 3, groups=2),
    )
    operations = select(pruned(module, (16, 64, 64), batch=1, density=0.1), 1)
    planner = Planner(Tuner(CpuTarget()), ConstantFile(None), PLACERS)
    planner.plan(operations)
    first, second, _ = [op for op in operations.operations if isinstance(op, Convolution)]
    # The pool works in both layouts: what it leaves is a quarter, and is moved if it is not planes.
    assert planner.moved_for_readers(first.output, planes=True) == 0
    assert planner.moved_for_readers(first.output, planes=False) == 32 * 32 * 32
    assert planner.moved_for_readers(second.output, planes=True) == 48 * 32 * 32
    assert planner.moved_for_readers(second.output, planes=False) == 0


def test_what_does_not_pay_stays_dense() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(32, 32, 3))
    program = check_pruned(module, (32, 8, 8), batch=1, density=0.9)
    assert "sparse_conv2d" not in kernel_names(program, 1)
    plan = plan_of_program(program, 1, CpuTarget("x86-64-v4"))
    notes = [call.note for call in plan.calls if call.note]
    assert len(notes) == 1
    assert notes[0].startswith("estimated: dense ")


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("seed", range(8))
def test_random_networks(seed: int) -> None:
    module = RandomNet(seed).eval()
    check_pruned(module, (module.channels, 12, 12), batch=1 + seed % 3, density=0.4)


def test_both_times_reach_the_binary() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(32, 32, 3, padding=1))
    program = pruned(module, (32, 14, 14), batch=1, density=0.05)
    binary = compile_program(replace(program), CpuTarget(tune="quick"), 1)
    notes = [step.note for step in binary.info.steps if step.note]
    assert notes
    assert all(note.startswith("measured: dense ") and "sparse" in note for note in notes)
