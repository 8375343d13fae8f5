"""Fully connected layers by tables of bytes: the kernel, and where it is used."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import EMULATED, run_emulated
from harness import ALL_STEPS, Array, KernelLibrary, apply_steps, random_array, sum_of_products
from hypothesis import given
from hypothesis import strategies as st
from small_nets import captured, compare, net
from torch import nn

import shohin
from shohin.backends.tvm.kernels.byte_codebook_linear import (
    ByteCodebookLinear,
    ByteForm,
    byte_tile_options,
)
from shohin.backends.tvm.kernels.byte_tables import TableName
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.matmul import MatrixTile
from shohin.backends.tvm.lowering import sparse_costs
from shohin.backends.tvm.target import CpuTarget
from shohin.ir.program import Program

Case = tuple[ByteCodebookLinear, Array]

_V2 = CpuTarget("x86-64-v2", tune="off")


def _layer(
    count: int = 16,
    rows: int = 1,
    columns: int = 37,
    depth: int = 50,
    tile: MatrixTile | None = None,
    steps: tuple[Step, ...] = (),
) -> Case:
    values = np.unique(random_array(np.random.default_rng(count), count))
    chosen = tile or byte_tile_options(rows, columns, 3)[0]
    form = ByteForm.of(values, "pshufb")
    return ByteCodebookLinear(rows, depth, columns, form, chosen, steps), values


def _draw(seed: int) -> Case:
    choose = random.Random(seed)
    return _layer(
        count=choose.randint(1, 16),
        rows=choose.randint(1, 5),
        columns=choose.randint(1, 200),
        depth=choose.randint(1, 90),
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 2))),
    )


_CASES: dict[str, Case] = {
    **{f"{count} values": _layer(count) for count in (1, 2, 3, 4, 5, 8, 9, 15, 16)},
    "one number": _layer(columns=1, depth=1),
    "one input more than a unit": _layer(5, depth=6),
    "less than a unit": _layer(5, depth=3),
    "deep": _layer(columns=20, depth=4100),
    "five rows": _layer(rows=5),
    "rows in ragged tiles": _layer(rows=5, tile=MatrixTile(2, 1)),
    "both in ragged tiles": _layer(rows=3, columns=75, tile=MatrixTile(2, 2)),
    "two splits": _layer(rows=2, tile=MatrixTile(2, 1, 2)),
    "more splits than a unit has": _layer(tile=MatrixTile(1, 1, 4)),
    "wider than the layer": _layer(columns=5, tile=MatrixTile(1, 4)),
    **{f"step {s.kind} {s.operand}": _layer(rows=2, steps=(s,)) for s in ALL_STEPS},
    **{f"random {seed}": _draw(seed) for seed in range(20)},
}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary([kernel for kernel, _ in _CASES.values()], _V2)


def _weight(kernel: ByteCodebookLinear, values: Array) -> Array:
    generator = np.random.default_rng(2)
    return np.asarray(values[generator.integers(0, values.size, (kernel.columns, kernel.depth))])


def _packed(kernel: ByteCodebookLinear, values: Array, weight: Array) -> Array:
    return kernel.pack(values, lambda start, stop: weight[start:stop])


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    kernel, values = _CASES[name]
    weight = _weight(kernel, values)
    generator = np.random.default_rng(5)
    x = random_array(generator, kernel.rows, kernel.depth)
    bias = random_array(generator, kernel.columns)
    shapes = {"full": (kernel.rows, kernel.columns), "channel": (kernel.columns,)}
    kinds = [step.operand for step in kernel.steps if step.operand != "none"]
    operands = [random_array(generator, *shapes[kind]) for kind in kinds]
    rows, taps, shift = (torch.from_numpy(array).double() for array in (x, weight, bias))
    sums = sum_of_products(
        rows @ taps.T + shift, rows.abs() @ taps.abs().T + shift.abs(), terms=kernel.depth + 1
    )
    expected = apply_steps(kernel.steps, sums, [torch.from_numpy(o).double() for o in operands])
    missing = (0, kernel.padded_columns - kernel.columns)
    padded = [np.pad(o, missing) if o.ndim == 1 else o for o in operands]
    index = _packed(kernel, values, weight)
    given = [x, index, kernel.form.table(values), np.pad(bias, missing), *padded]
    expected.check(library.run(kernel, given))


def _decoded(kernel: ByteCodebookLinear, index: Array, table: Array) -> Array:
    """The weights that units stand for, computed without the kernel."""
    form = kernel.form
    units = index.view(np.uint8 if form.word_bytes == 1 else np.uint16).astype(np.uint32)
    parts = [(units >> np.uint32(p * form.bits)) % (1 << form.bits) for p in range(form.per_word)]
    found = np.stack(parts, axis=2).transpose(0, 3, 1, 2)
    found = found.reshape(kernel.padded_columns, -1)[: kernel.columns, : kernel.depth]
    values = np.ascontiguousarray(table.reshape(4, -1).T).view(np.float32).reshape(-1)
    return np.asarray(values[found])


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64, unique=True),
    columns=st.integers(1, 70),
    depth=st.integers(1, 40),
)
def test_units_stand_for_exactly_the_weights(values: list[float], columns: int, depth: int) -> None:
    numbers = np.unique(np.array(values, np.float32))
    form = ByteForm.of(numbers, "tbl")
    assert form.exists
    kernel = ByteCodebookLinear(1, depth, columns, form, MatrixTile(1, 2))
    weight = _weight(kernel, numbers)
    index, table = _packed(kernel, numbers, weight), form.table(numbers)
    assert index.shape == kernel.parameters()[1].shape
    assert table.shape == kernel.parameters()[2].shape
    np.testing.assert_array_equal(_decoded(kernel, index, table), weight)


@pytest.mark.parametrize(
    ("count", "bits", "size", "per_word", "tables"),
    [
        (1, 1, 1, 8, 1),
        (4, 2, 1, 4, 1),
        (8, 3, 2, 5, 1),
        (16, 4, 1, 2, 1),
        (17, 5, 2, 3, 2),
        (64, 6, 1, 1, 4),
    ],
)
def test_forms(count: int, bits: int, size: int, per_word: int, tables: int) -> None:
    form = ByteForm.of(np.arange(count, dtype=np.float32), "tbl")
    assert (form.bits, form.word_bytes, form.per_word, form.tables) == (
        bits,
        size,
        per_word,
        tables,
    )


@pytest.mark.parametrize(("name", "most"), [("pshufb", 16), ("vtbl", 32), ("tbl", 64)])
def test_tables_that_are_too_large(name: TableName, most: int) -> None:
    assert ByteForm.of(np.arange(most, dtype=np.float32), name).exists
    assert not ByteForm.of(np.arange(most + 1, dtype=np.float32), name).exists


# From here on: where the kernel is used.


@pytest.fixture
def always_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates by which looking weights up wins wherever there is a kernel."""

    def factor(kernel: Kernel) -> float:
        return 1e-9 if isinstance(kernel, ByteCodebookLinear) else 1.0

    monkeypatch.setattr(sparse_costs, "_factor", factor)


def _shared(bits: int, *sizes: int) -> Program:
    torch.manual_seed(0)
    depth, middle, columns = sizes
    module = net(
        lambda s, x: s.b(torch.relu(s.a(x))),
        a=nn.Linear(depth, middle),
        b=nn.Linear(middle, columns),
    )
    text = f"share-weights{{bits={bits}}}"
    return shohin.optimize(captured(module, (depth,)), text, drift=False).program


def _kernels(program: Program, target: str, batch: int = 1) -> list[str]:
    compiled = shohin.compile(program, target, batch=batch)
    return [step.kernel.split()[0] for step in compiled.info.steps]


@pytest.mark.usefixtures("always_codebook")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_networks(bits: int, batch: int) -> None:
    program = _shared(bits, 96, 80, 75)
    binary = shohin.compile(program, "cpu{arch=x86-64-v2}", batch=batch)
    assert [step.kernel.split()[0] for step in binary.info.steps] == ["byte_codebook_linear"] * 2
    x = torch.randn(batch, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        compare(binary(x), program.module(x), 1e-5)


@EMULATED
@pytest.mark.usefixtures("always_codebook")
@pytest.mark.parametrize("bits", [3, 4, 5, 6])
@pytest.mark.parametrize("target", ["arm", "armv7"])
def test_emulated(target: str, bits: int, tmp_path: Path) -> None:
    if target == "armv7" and bits == 6:
        pytest.skip("64 values are too many for it")
    program = _shared(bits, 96, 80, 75)
    assert _kernels(program, target, 2) == ["byte_codebook_linear"] * 2
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    plain = run_emulated(program, target, [x], tmp_path)
    with torch.no_grad():
        compare(plain, program.module(x), 1e-5)
    if bits == 4:
        assert torch.equal(run_emulated(program, target, [x], tmp_path, "compressed"), plain)


@pytest.mark.parametrize("target", ["arm", "armv7", "cpu{arch=x86-64-v2}"])
def test_large_weights_of_one_row_are_looked_up(target: str) -> None:
    program = _shared(4, 640, 640, 32)
    assert _kernels(program, target) == ["byte_codebook_linear", "linear"]
    assert _kernels(program, target, batch=4) == ["linear", "linear"]
    compiled = shohin.compile(program, target)
    assert compiled.info.steps[0].note == "estimated: dense 0.008 ms, codebook 0.005 ms"
    assert compiled.constant_bytes < 0.2 * 4 * 640 * 640


@pytest.mark.parametrize(
    ("target", "bits", "note"),
    [
        ("armv7", 6, "dense; no codebook kernel for 64 values on armv7-a"),
        ("arm", 7, "dense; no codebook kernel for 128 values on armv8-a"),
        ("cpu{arch=x86-64-v2}", 5, "dense; no codebook kernel for 32 values on x86-64-v2"),
    ],
)
def test_what_there_is_no_kernel_for(target: str, bits: int, note: str) -> None:
    compiled = shohin.compile(_shared(bits, 96, 80, 75), target)
    assert [step.note for step in compiled.info.steps] == [note] * 2
