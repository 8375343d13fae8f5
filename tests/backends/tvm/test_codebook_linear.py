"""Fully connected layers whose weights are indices of a table: the kernel, and where it is used."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import ALL_STEPS, Array, KernelLibrary, apply_steps, random_array, sum_of_products
from hypothesis import given
from hypothesis import strategies as st
from small_nets import captured, compare, net, plan_of_program
from torch import nn
from torch.nn import functional

import shohin
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.codebook_linear import (
    CodebookLinear,
    TableForm,
    choose_codebook_tile,
    codebook_tile_options,
)
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.matmul import MatMul, MatrixTile
from shohin.backends.tvm.lowering import sparse_costs
from shohin.backends.tvm.lowering.lower import lower, select
from shohin.backends.tvm.lowering.operations import Linear
from shohin.backends.tvm.target import CpuTarget, host_runs
from shohin.backends.tvm.tuning.cache import TuningCache
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.ir.program import Program

Case = tuple[CodebookLinear, Array]

_ARCHS = {"x86-64-v4": 16, "x86-64-v3": 8}
_SIZES = (1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65)
"""Numbers of values around those at which indices or look-ups change."""


def _values(count: int, zero: bool = False) -> Array:
    values = random_array(np.random.default_rng(count), count)
    values[count // 2] = 0.0 if zero else values[count // 2]
    return values


def _layer(
    lanes: int,
    count: int = 16,
    rows: int = 1,
    columns: int = 37,
    depth: int = 50,
    zero: bool = False,
    tile: MatrixTile | None = None,
    steps: tuple[Step, ...] = (),
) -> Case:
    values = _values(count, zero)
    form = TableForm.of(values, lanes)
    chosen = tile or choose_codebook_tile(form, rows, columns, 30 if lanes == 16 else 7)
    return CodebookLinear(rows, depth, columns, form, chosen, steps), values


def _draw(lanes: int, seed: int) -> Case:
    choose = random.Random(seed)
    return _layer(
        lanes,
        count=choose.randint(1, 4 * lanes),
        rows=choose.randint(1, 5),
        columns=choose.randint(1, 200),
        depth=choose.randint(1, 90),
        zero=choose.random() < 0.5,
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 2))),
    )


def _cases(lanes: int) -> dict[str, Case]:
    sizes = [n for n in _SIZES if TableForm.of(_values(n, zero=True), lanes).exists]
    plain = [n for n in _SIZES if TableForm.of(_values(n), lanes).exists]
    return {
        **{f"{n} values with zero": _layer(lanes, n, zero=True) for n in sizes},
        **{f"{n} values": _layer(lanes, n) for n in plain},
        "one number": _layer(lanes, columns=1, depth=1),
        "less than a word": _layer(lanes, depth=3),
        "whole words and tiles": _layer(lanes, columns=64, depth=64, tile=MatrixTile(1, 2)),
        "deep": _layer(lanes, columns=20, depth=4100),
        "five rows": _layer(lanes, rows=5),
        "rows in ragged tiles": _layer(lanes, rows=5, tile=MatrixTile(2, 1)),
        "both in ragged tiles": _layer(lanes, rows=3, columns=75, tile=MatrixTile(2, 2)),
        "two splits": _layer(lanes, rows=2, tile=MatrixTile(2, 1, 2)),
        "more splits than a word has": _layer(lanes, 4 * lanes, tile=MatrixTile(1, 1, 8)),
        "wider than the layer": _layer(lanes, columns=5, tile=MatrixTile(1, 4)),
        **{f"step {s.kind} {s.operand}": _layer(lanes, rows=2, steps=(s,)) for s in ALL_STEPS},
        **{f"random {seed}": _draw(lanes, seed) for seed in range(20)},
    }


_CASES = {lanes: _cases(lanes) for lanes in _ARCHS.values()}


@pytest.fixture(scope="module", params=_ARCHS)
def library(request: pytest.FixtureRequest) -> tuple[KernelLibrary, dict[str, Case]]:
    arch = request.param
    if host_runs(arch):
        pytest.skip(host_runs(arch))
    cases = _CASES[_ARCHS[arch]]
    return KernelLibrary([kernel for kernel, _ in cases.values()], CpuTarget(arch)), cases


def _weight(kernel: CodebookLinear, values: Array) -> Array:
    generator = np.random.default_rng(2)
    return np.asarray(values[generator.integers(0, values.size, (kernel.columns, kernel.depth))])


def _packed(kernel: CodebookLinear, values: Array, weight: Array) -> Array:
    return kernel.pack(values, lambda start, stop: weight[start:stop])


@pytest.mark.parametrize("name", sorted({name for cases in _CASES.values() for name in cases}))
def test_against_torch(library: tuple[KernelLibrary, dict[str, Case]], name: str) -> None:
    compiled, cases = library
    if name not in cases:
        pytest.skip("more values than this processor looks up")
    kernel, values = cases[name]
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
    index = _packed(kernel, values, weight)
    padded = [np.pad(o, missing) if o.ndim == 1 else o for o in operands]
    given = [x, index, kernel.form.table(values), np.pad(bias, missing), *padded]
    expected.check(compiled.run(kernel, given))


def _decoded(kernel: CodebookLinear, index: Array, table: Array) -> Array:
    """The weights that words stand for, computed without the kernel."""
    form = kernel.form
    words = index.view(np.uint32)
    parts = [(words >> np.uint32(p * form.bits)) % (1 << form.bits) for p in range(form.per_word)]
    found = np.stack(parts, axis=2).transpose(0, 3, 1, 2)
    found = found.reshape(kernel.padded_columns, -1)[: kernel.columns, : kernel.depth]
    values = table[found % form.entries]
    return np.where(found < form.entries, 0, values) if form.zero_bit else values


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=65, unique=True),
    columns=st.integers(1, 70),
    depth=st.integers(1, 40),
    lanes=st.sampled_from([8, 16]),
)
def test_words_stand_for_exactly_the_weights(
    values: list[float], columns: int, depth: int, lanes: int
) -> None:
    numbers = np.unique(np.array(values, np.float32))
    form = TableForm.of(numbers, lanes)
    kernel = CodebookLinear(1, depth, columns, form, MatrixTile(1, 2))
    weight = _weight(kernel, numbers)
    index, table = _packed(kernel, numbers, weight), form.table(numbers)
    assert index.shape == kernel.parameters()[1].shape
    assert table.shape == kernel.parameters()[2].shape
    np.testing.assert_array_equal(_decoded(kernel, index, table), weight)


@pytest.mark.parametrize(
    ("count", "zero", "lanes", "form"),
    [
        (1, False, 16, TableForm(1, 16)),
        (2, True, 16, TableForm(1, 16)),
        (5, False, 8, TableForm(3, 8)),
        (9, True, 16, TableForm(4, 16)),
        (9, True, 8, TableForm(4, 8, zero_bit=True)),
        (9, False, 8, TableForm(4, 8)),
        (17, True, 16, TableForm(5, 16)),
        (33, True, 16, TableForm(6, 16, zero_bit=True)),
        (33, False, 16, TableForm(6, 16)),
        (34, True, 16, TableForm(6, 16)),
        (65, True, 16, TableForm(7, 16, zero_bit=True)),
    ],
)
def test_forms(count: int, zero: bool, lanes: int, form: TableForm) -> None:
    assert TableForm.of(_values(count, zero), lanes) == form
    assert form.exists


@pytest.mark.parametrize(
    ("count", "zero", "lanes"), [(65, False, 16), (66, True, 16), (34, True, 8)]
)
def test_tables_that_are_too_large(count: int, zero: bool, lanes: int) -> None:
    assert not TableForm.of(_values(count, zero), lanes).exists


def test_zeros_are_words_of_zeros() -> None:
    for count in (4, 9, 33):
        kernel, values = _layer(8 if count == 9 else 16, count, zero=True)
        weight = np.zeros((kernel.columns, kernel.depth), np.float32)
        assert not _packed(kernel, values, weight).any()


@pytest.mark.parametrize(("lanes", "registers"), [(16, 30), (8, 7)])
def test_tiles_fit(lanes: int, registers: int) -> None:
    for count in (2, 16, 32):
        form = TableForm.of(_values(count), lanes)
        table = -(-form.tables * lanes // 16)
        for rows in range(1, 20):
            for columns in (1, 16, 40, 300, 4096):
                for tile in codebook_tile_options(form, rows, columns, registers):
                    assert 1 <= tile.rows <= rows
                    sums = tile.rows * tile.column_blocks * tile.splits
                    assert table + tile.column_blocks + sums <= registers


# From here on: where the kernel is used.

needs_tables = pytest.mark.skipif(
    not CpuTarget().table_lanes(), reason="this processor has no permutation of floats"
)


@pytest.fixture
def always_codebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates by which looking weights up wins wherever there is a kernel."""

    def factor(kernel: Kernel) -> float:
        return 1e-9 if isinstance(kernel, CodebookLinear) else 1.0

    monkeypatch.setattr(sparse_costs, "_factor", factor)


def _shared(module: nn.Module, *shape: int, pipeline: str = "share-weights{bits=4}") -> Program:
    return shohin.optimize(captured(module, shape), pipeline, drift=False).program


def _linear(depth: int = 96, columns: int = 80) -> nn.Module:
    return net(lambda s, x: s.a(x), a=nn.Linear(depth, columns))


def _families(program: Program, batch: int = 1, arch: str = "x86-64-v4") -> list[str]:
    plan = plan_of_program(program, batch, CpuTarget(arch))
    return [call.kernel.family for call in plan.calls]


def _notes(program: Program, batch: int = 1, arch: str = "x86-64-v4") -> list[str]:
    plan = plan_of_program(program, batch, CpuTarget(arch))
    return [call.note for call in plan.calls if call.note]


def _check(
    program: Program, *shape: int, batch: int = 1, threads: int = 2, arch: str = "native"
) -> None:
    """Compile a program and compare its output with PyTorch's."""
    binary = compile_program(program, CpuTarget(arch, threads=threads), batch)
    assert any(step.kernel.startswith("codebook_linear ") for step in binary.info.steps)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        compare(binary(x), program.module(x), 1e-5)


_PIPELINES = {
    "3 bits": "share-weights{bits=3}",
    "4 bits": "share-weights{bits=4}",
    "5 bits": "share-weights{bits=5}",
    "6 bits": "share-weights{bits=6}",
    "pruned": "prune{density=0.3}, share-weights{bits=4}",
    "pruned, 33 values": "prune{density=0.3}, share-weights{bits=5}",
}


@needs_tables
@pytest.mark.usefixtures("always_codebook")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", _PIPELINES)
def test_networks(name: str, batch: int) -> None:
    if name == "6 bits" and CpuTarget().table_lanes() < 16:
        pytest.skip("this processor permutes eight floats: 64 values are too many for it")
    module = net(
        lambda s, x: s.b(functional.relu(s.a(x))), a=nn.Linear(96, 80), b=nn.Linear(80, 75)
    )
    program = _shared(module, 96, pipeline=_PIPELINES[name])
    assert _families(program, batch) == ["codebook_linear"] * 2
    _check(program, 96, batch=batch)


@pytest.mark.skipif(bool(host_runs("x86-64-v3")), reason="needs AVX2")
@pytest.mark.usefixtures("always_codebook")
@pytest.mark.parametrize("name", ["3 bits", "4 bits", "pruned"])
def test_networks_with_vectors_of_eight(name: str) -> None:
    _check(_shared(_linear(), 96, pipeline=_PIPELINES[name]), 96, arch="x86-64-v3")


@needs_tables
@pytest.mark.usefixtures("always_codebook")
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [16, 20])
def test_images_are_taken_as_they_lie(channels: int, batch: int) -> None:
    """Also with channels that only fill up a block: no value of the weight need be zero."""
    module = net(
        lambda s, x: s.b(functional.relu(s.a(x)).flatten(1)),
        a=nn.Conv2d(3, channels, 3, stride=2),
        b=nn.Linear(channels * 25, 30),
    )
    program = _shared(module, 3, 11, 11)
    weight = program.encodings["b.weight"].materialise()
    assert (weight != 0).all()
    assert "to_plain" not in _families(program, batch)
    _check(program, 3, 11, 11, batch=batch)


@needs_tables
@pytest.mark.usefixtures("always_codebook")
def test_steps_are_fused() -> None:
    module = net(lambda s, x: functional.gelu(s.a(x) + x) * 2, a=nn.Linear(80, 80, bias=False))
    program = _shared(module, 80)
    assert _families(program, 2) == ["codebook_linear"]
    _check(program, 80, batch=2)


@needs_tables
@pytest.mark.usefixtures("always_codebook")
def test_weights_that_are_coded_in_the_binary() -> None:
    program = _shared(_linear(), 96, pipeline="prune{density=0.1}, share-weights{bits=4}")
    plain = compile_program(program, CpuTarget(), 1)
    coded = compile_program(program, CpuTarget(), 1, weights="compressed")
    assert coded.info.weight_bytes < 0.6 * plain.info.weight_bytes
    x = np.random.default_rng(0).standard_normal((1, 96), np.float32)
    np.testing.assert_array_equal(coded(x), plain(x))


def _linear_of(program: Program) -> Linear:
    (found,) = (op for op in select(program, 1).operations if isinstance(op, Linear))
    return found


def test_selection_knows_the_values() -> None:
    program = captured(_linear(), (96,))
    assert _linear_of(program).values is None
    shared = _linear_of(_shared(_linear(), 96))
    assert shared.values is not None
    assert set(shared.values.tolist()) == set(shared.weight.flatten().tolist())
    both = _linear_of(_shared(_linear(), 96, pipeline="prune, share-weights{bits=3}"))
    assert both.sparse
    assert both.values is not None
    assert set(both.values.tolist()) == set(both.weight.flatten().tolist())
    assert _linear_of(_shared(_linear(), 96, pipeline="prune")).values is None


def test_large_weights_of_one_row_are_looked_up() -> None:
    program = _shared(_linear(640, 640), 640)
    assert _families(program) == ["codebook_linear"]
    assert _families(program, batch=4) == ["linear"]
    assert _families(_shared(_linear(), 96)) == ["linear"]
    (note,) = _notes(program)
    assert note == "estimated: dense 0.008 ms, codebook 0.003 ms"


def test_sparse_weights_are_compared_three_ways() -> None:
    program = _shared(_linear(), 96, pipeline="prune{density=0.5}, share-weights{bits=4}")
    (note,) = _notes(program)
    names = [part.split()[0] for part in note.removeprefix("estimated: ").split(", ")]
    assert names == ["dense", "sparse", "codebook"]
    few = _shared(_linear(640, 640), 640, pipeline="prune{density=0.001}, share-weights{bits=2}")
    assert _families(few) == ["block_linear"]


@pytest.mark.parametrize(
    ("pipeline", "batch", "arch", "note"),
    [
        ("share-weights{bits=4}", 17, "x86-64-v4", "dense; no codebook kernel for 17 rows"),
        (
            "share-weights{bits=7}",
            1,
            "x86-64-v4",
            "dense; no codebook kernel for 128 values on x86-64-v4",
        ),
        (
            "share-weights{bits=6}",
            1,
            "x86-64-v3",
            "dense; no codebook kernel for 64 values on x86-64-v3",
        ),
    ],
)
def test_what_there_is_no_kernel_for(pipeline: str, batch: int, arch: str, note: str) -> None:
    program = _shared(_linear(), 96, pipeline=pipeline)
    assert _families(program, batch, arch) == ["linear"]
    assert _notes(program, batch, arch) == [note]


def test_sparse_times_stay_where_there_is_no_codebook_kernel() -> None:
    program = _shared(_linear(), 96, pipeline="prune, share-weights{bits=5}")
    (note,) = _notes(program, arch="x86-64-v2")
    assert note.startswith("estimated: dense ")
    assert note.endswith("; no codebook kernel for 33 values on x86-64-v2")


@needs_tables
def test_measured_times_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The faster one by the cache of measurements, whatever the estimates say."""
    program = _shared(_linear(), 96)
    tuner = Tuner(CpuTarget(tune="quick"), TuningCache(tmp_path))

    def choose(times: dict[type[Kernel], float]) -> tuple[str, str]:
        monkeypatch.setattr(
            "shohin.backends.tvm.tuning.tuner.measure_kernels",
            lambda kernels, target: [times[type(kernel)] for kernel in kernels],
        )
        for file in tmp_path.rglob("*.json"):
            file.unlink()
        plan = lower(program, tuner, 1, tmp_path / "constants", lambda done, total, text: None)
        return plan.calls[0].kernel.family, plan.calls[0].note

    fast, slow = choose({MatMul: 2.7, CodebookLinear: 0.9}), choose({MatMul: 1, CodebookLinear: 2})
    assert fast == ("codebook_linear", "measured: dense 2.700 ms, codebook 0.900 ms")
    assert slow == ("linear", "measured: dense 1.000 ms, codebook 2.000 ms")
