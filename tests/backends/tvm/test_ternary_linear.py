"""Fully connected layers with ternary weights: the kernels, and where they are used."""

import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import EMULATED
from harness import ALL_STEPS, KernelLibrary, apply_steps, random_array, sum_of_products
from small_nets import compare, net, plan_of_program
from ternary_nets import (
    SCALES,
    Scales,
    check_emulated,
    check_ternary,
    families,
    notes,
    ternary,
    ternary_weight,
)
from torch import nn
from torch.nn import functional

from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.matmul import MatMul, MatrixTile
from shohin.backends.tvm.kernels.packed_matmul import PackedMatMul
from shohin.backends.tvm.kernels.subset_sums import SubsetForm, SubsetSums
from shohin.backends.tvm.kernels.ternary_codes import MOST_SCRATCH
from shohin.backends.tvm.kernels.ternary_linear import TernaryLinear, ternary_tile_options
from shohin.backends.tvm.lowering import sparse_costs
from shohin.backends.tvm.lowering.lower import lower, select
from shohin.backends.tvm.lowering.operations import Linear
from shohin.backends.tvm.target import CpuTarget, host_runs
from shohin.backends.tvm.tuning.cache import TuningCache
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.ir.program import Program

_STEPS = (Step("relu"), *(Step("add", operand=kind) for kind in ("full", "channel")))

_ARCHS = {"x86-64-v4": 16, "x86-64-v3": 8, "x86-64-v2": 0}
"""Floats of a vector that one instruction orders."""


def _packed(
    rows: int = 1,
    columns: int = 37,
    depth: int = 50,
    tile: MatrixTile | None = None,
    steps: tuple[Step, ...] = (),
    items: int = 1,
) -> PackedMatMul:
    chosen = tile or MatrixTile(min(rows, 2), 1)
    return PackedMatMul(1, rows, depth, columns, True, True, chosen, steps=steps, items=items)


def _by_subsets(
    lanes: int,
    rows: int = 1,
    columns: int = 37,
    depth: int = 50,
    tile: MatrixTile | None = None,
    steps: tuple[Step, ...] = (),
) -> TernaryLinear:
    form = SubsetForm.of(lanes)
    chosen = tile or ternary_tile_options(rows, columns, 30 if lanes == 16 else 7)[0]
    return TernaryLinear(rows, depth, columns, form, chosen, steps)


def _cases(lanes: int) -> dict[str, Kernel]:
    makers = {"packed": _packed, **({"subsets": partial(_by_subsets, lanes)} if lanes else {})}
    cases: dict[str, Kernel] = {}
    for name, make in makers.items():
        choose = random.Random(lanes)
        cases |= {
            f"{name}, one number": make(columns=1, depth=1),
            f"{name}, less than a word": make(depth=3),
            f"{name}, whole words and tiles": make(columns=64, depth=240, tile=MatrixTile(1, 2)),
            f"{name}, deep": make(columns=20, depth=4100),
            f"{name}, five rows": make(rows=5),
            f"{name}, rows in ragged tiles": make(rows=5, tile=MatrixTile(2, 1)),
            f"{name}, both ragged": make(rows=3, columns=75, tile=MatrixTile(2, 2)),
            f"{name}, wider than the layer": make(columns=5, tile=MatrixTile(1, 4)),
            **{f"{name}, step {s.kind} {s.operand}": make(rows=2, steps=(s,)) for s in _STEPS},
        }
        for seed in range(8):
            cases[f"{name}, random {seed}"] = make(
                rows=choose.randint(1, 5),
                columns=choose.randint(1, 200),
                depth=choose.randint(1, 90),
                steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 2))),
            )
    cases["packed, in registers, splits"] = _packed(rows=2, tile=MatrixTile(2, 1, 4))
    cases["packed, no scratch is large enough"] = _packed(
        rows=3, columns=17, depth=9000, tile=MatrixTile(2, 2)
    )
    for rows, items in ((12, 6), (13, 6), (13, 8), (13, 100), (5, 9)):
        name = f"packed, {rows} rows for {items} items"
        cases[name] = _packed(rows=rows, tile=MatrixTile(2, 2), items=items)
        wide = _packed(rows=rows, depth=9000, tile=MatrixTile(2, 2), items=items)
        cases[f"{name}, no scratch"] = wide
    return cases


_CASES = {lanes: _cases(lanes) for lanes in _ARCHS.values()}


@pytest.fixture(scope="module", params=_ARCHS)
def library(request: pytest.FixtureRequest) -> tuple[KernelLibrary, dict[str, Kernel]]:
    arch = request.param
    if host_runs(arch):
        pytest.skip(host_runs(arch))
    cases = _CASES[_ARCHS[arch]]
    tables = [_tables_of(k) for k in cases.values() if isinstance(k, TernaryLinear)]
    return KernelLibrary([*cases.values(), *tables], CpuTarget(arch)), cases


def _tables_of(kernel: TernaryLinear) -> SubsetSums:
    return SubsetSums(kernel.rows, kernel.depth, kernel.form)


@pytest.mark.parametrize("name", sorted({name for cases in _CASES.values() for name in cases}))
def test_against_torch(library: tuple[KernelLibrary, dict[str, Kernel]], name: str) -> None:
    compiled, cases = library
    if name not in cases:
        pytest.skip("this processor has no permutation of floats")
    kernel = cases[name]
    assert isinstance(kernel, TernaryLinear | PackedMatMul)
    weight = ternary_weight((kernel.columns, kernel.depth), "by row")
    generator = np.random.default_rng(5)
    x = random_array(generator, kernel.rows, kernel.depth)
    bias = random_array(generator, kernel.columns)
    shapes = {"full": (kernel.rows, kernel.columns), "channel": (kernel.columns,)}
    kinds = [step.operand for step in kernel.steps if step.operand != "none"]
    operands = [random_array(generator, *shapes[kind]) for kind in kinds]
    rows, shift = torch.from_numpy(x).double(), torch.from_numpy(bias).double()
    taps = weight.materialise().double()
    # Products of both values with a sum of inputs each: two roundings more.
    sums = sum_of_products(
        rows @ taps.T + shift, rows.abs() @ taps.abs().T + shift.abs(), terms=kernel.depth + 3
    )
    expected = apply_steps(kernel.steps, sums, [torch.from_numpy(o).double() for o in operands])
    missing = (0, kernel.padded_columns - kernel.columns)
    values = np.pad(weight.pairs().numpy().T * [[1], [-1]], ((0, 0), missing)).astype(np.float32)
    given = compiled.run(_tables_of(kernel), [x]) if isinstance(kernel, TernaryLinear) else x
    codes = weight.codes.numpy()
    words = kernel.pack(lambda start, stop: codes[start:stop])
    padded = [np.pad(o, missing) if o.ndim == 1 else o for o in operands]
    found = compiled.run(kernel, [given, words, values, np.pad(bias, missing), *padded])
    expected.check(found.reshape(kernel.rows, kernel.columns))


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("depth", [1, 3, 14, 15, 16, 17, 50])
def test_words_choose_exactly_the_inputs(lanes: int, depth: int) -> None:
    kernel = _by_subsets(lanes, depth=depth, tile=MatrixTile(1, 2))
    form, codes = kernel.form, ternary_weight((kernel.columns, depth)).codes.numpy()
    packed = kernel.pack(lambda start, stop: codes[start:stop])
    assert packed.shape == kernel.parameters()[1].shape
    words = packed.view(np.uint32).transpose(0, 2, 1).reshape(kernel.padded_columns, -1)
    found = np.zeros((kernel.padded_columns, form.words(depth), form.inputs), int)
    for place in range(form.inputs):
        group, index = divmod(place, form.group)
        low = group * form.bits + index
        found[:, :, place] = words >> low & 1
        found[:, :, place] -= (words >> (low + form.group) & 1).astype(int)
    found = found.reshape(kernel.padded_columns, -1)
    np.testing.assert_array_equal(found[: kernel.columns, :depth], codes)
    assert not found[kernel.columns :].any()
    assert not found[:, depth:].any()


def test_scratch_fits_the_stack() -> None:
    """Half of what a thread has at least, once for whole and ragged tiles together."""
    largest = _packed(rows=5, columns=100, depth=2048, tile=MatrixTile(2, 4))
    assert 4 * largest.scratch == MOST_SCRATCH == 1 << 19
    assert not replace(largest, depth=2049).scratch
    sizes = re.findall(r"alloc_local\(\((\d+),\)", largest.build().script())
    assert sizes.count(str(largest.scratch)) == 1
    assert sum(int(size) for size in sizes if int(size) != largest.scratch) < 1 << 15


def test_rows_are_cut_where_there_are_few_columns() -> None:
    some = _packed(rows=100, columns=40, tile=MatrixTile(4, 1))
    extents = [replace(some, items=items).extent for items in (1, 3, 4, 6, 12, 24, 1000)]
    assert extents == [3, 3, 6, 6, 12, 21, 75]
    assert replace(some, columns=4096, items=16).extent == 256
    program = ternary(_linear(columns=20), (96,), batch=200)
    for threads, extent in ((1, 2), (4, 14)):
        plan = plan_of_program(program, 200, CpuTarget("x86-64-v3", threads=threads))
        assert [call.kernel.family for call in plan.calls] == ["packed_linear"]
        assert [call.extent for call in plan.calls] == [extent]


@pytest.mark.parametrize(("lanes", "registers"), [(16, 30), (8, 7)])
def test_tiles_fit(lanes: int, registers: int) -> None:
    for rows in range(1, 20):
        for columns in (1, 16, 40, 300, 4096):
            tiles = ternary_tile_options(rows, columns, registers)
            assert tiles
            for tile in tiles:
                assert 1 <= tile.rows <= rows
                assert tile.column_blocks * (1 + 2 * tile.rows) <= registers


# From here on: where the kernels are used.

needs_tables = pytest.mark.skipif(
    not CpuTarget().table_lanes(), reason="this processor has no permutation of floats"
)


def _linear(depth: int = 96, columns: int = 80, bias: bool = True) -> nn.Module:
    return net(lambda s, x: s.a(x), a=nn.Linear(depth, columns, bias=bias))


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("scales", SCALES)
def test_networks(scales: Scales, batch: int) -> None:
    module = net(
        lambda s, x: s.b(functional.relu(s.a(x))),
        a=nn.Linear(96, 80),
        b=nn.Linear(80, 75, bias=False),
    )
    program = ternary(module, (96,), batch=batch, scales=scales)
    assert "linear" not in families(program, batch)
    check_ternary(program, (96,), batch=batch)


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
@pytest.mark.parametrize("batch", [1, 5])
def test_other_processors(arch: str, batch: int) -> None:
    if host_runs(arch):
        pytest.skip(host_runs(arch))
    program = ternary(_linear(), (96,), batch=batch, scales="by row")
    assert "linear" not in families(program, batch, arch)
    check_ternary(program, (96,), batch=batch, arch=arch)


@EMULATED
@pytest.mark.parametrize("target", ["arm", "armv7"])
@pytest.mark.parametrize("batch", [1, 9])
def test_arm(batch: int, target: str, tmp_path: Path) -> None:
    program = ternary(_linear(), (96,), batch=batch, scales="rows")
    check_emulated(program, target, tmp_path, (96,), batch=batch)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels", [16, 20])
def test_images_are_taken_as_they_lie(channels: int, batch: int) -> None:
    module = net(
        lambda s, x: s.b(functional.relu(s.a(x)).flatten(1)),
        a=nn.Conv2d(3, channels, 3, stride=2),
        b=nn.Linear(channels * 25, 30),
    )
    program = ternary(module, (3, 11, 11), batch=batch, scales="rows")
    assert "to_plain" not in families(program, batch)
    check_ternary(program, (3, 11, 11), batch=batch)


@pytest.mark.parametrize("batch", [2, 10])
def test_steps_are_fused(batch: int) -> None:
    module = net(lambda s, x: functional.gelu(s.a(x) + x) * 2, a=nn.Linear(80, 80, bias=False))
    program = ternary(module, (80,), batch=batch)
    assert [name for name in families(program, batch) if name != "subset_sums"] in (
        ["packed_linear"],
        ["ternary_linear"],
    )
    check_ternary(program, (80,), batch=batch)


@pytest.mark.parametrize("arch", ["native", "x86-64-v2", "x86-64-v4"])
def test_weights_stay_packed(arch: str) -> None:
    """The constants are codes, two values and a bias for each output, and what fills them up."""
    program = ternary(_linear(600, 320), (600,), scales="by row")
    binary = compile_program(program, CpuTarget(arch), 1)
    assert {step.kernel.split()[0] for step in binary.info.steps} <= {
        "packed_linear",
        "subset_sums",
        "ternary_linear",
    }
    # Words of 30 bits in use at least, and tiles of at most 8 blocks.
    assert binary.constant_bytes < 600 * 384 * 2 / 8 * 32 / 30 + 3 * 4 * 384 + 256


def test_weights_that_are_coded_in_the_binary() -> None:
    program = ternary(_linear(600, 320), (600,), density=0.1)
    plain = compile_program(program, CpuTarget(), 1)
    coded = compile_program(program, CpuTarget(), 1, weights="compressed")
    entropy = -(0.9 * np.log2(0.9) + 0.1 * np.log2(0.05))
    assert coded.info.weight_bytes < 1.2 * entropy / 8 * 600 * 320 + 3 * 4 * 320
    x = np.random.default_rng(0).standard_normal((1, 600), np.float32)
    np.testing.assert_array_equal(coded(x), plain(x))
    with torch.no_grad():
        expected = program.module(torch.from_numpy(x))
    compare(torch.from_numpy(np.asarray(coded(x))), expected, 1e-5)


def _linear_of(program: Program) -> Linear:
    (found,) = (op for op in select(program, 1).operations if isinstance(op, Linear))
    return found


def test_selection_knows_the_codes() -> None:
    for scales in SCALES:
        op = _linear_of(ternary(_linear(), (96,), scales=scales))
        assert op.ternary is not None
        codes, values = op.ternary.codes.float(), op.ternary.values
        both = codes.clamp(min=0) * values[:, :1] - codes.clamp(max=0) * values[:, 1:]
        torch.testing.assert_close(both, op.weight, rtol=0, atol=0)
        assert not op.sparse
    assert _linear_of(ternary(_linear(), (96,), density=0.1)).sparse


def test_few_weights_are_compared_as_lists_as_well() -> None:
    program = ternary(_linear(), (96,), density=0.1)
    (note,) = notes(program)
    names = [part.split()[0] for part in note.removeprefix("estimated: ").split(", ")]
    assert names == ["dense", "sparse", "packed"]
    few = ternary(_linear(640, 640), (640,), density=0.0005)
    assert families(few) == ["block_linear"]
    check_ternary(few, (640,))


def test_sums_of_subsets_are_for_few_rows() -> None:
    program = ternary(_linear(), (96,))
    assert families(program, 8) == ["subset_sums", "ternary_linear"]
    assert families(program, 9) == ["packed_linear"]
    assert families(program, 1, "x86-64-v2") == ["packed_linear"]


def test_packed_weights_are_preferred_where_they_are_hardly_slower() -> None:
    dense, near, far = (sparse_costs.Cost(time, True) for time in (1.0, 1.049, 1.051))
    assert sparse_costs.Comparison(dense, packed=near).best == "packed"
    assert sparse_costs.Comparison(dense, packed=far).best == "dense"
    assert sparse_costs.Comparison(far, sparse=dense, packed=near).best == "packed"
    assert sparse_costs.Comparison(far, sparse=dense).best == "sparse"


@needs_tables
def test_measured_times_decide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = ternary(_linear(), (96,))
    tuner = Tuner(CpuTarget(tune="quick"), TuningCache(tmp_path))

    def choose(times: dict[type[Kernel], float]) -> tuple[list[str], str]:
        monkeypatch.setattr(
            "shohin.backends.tvm.tuning.tuner.measure_kernels",
            lambda kernels, target: [times[type(kernel)] for kernel in kernels],
        )
        for file in tmp_path.rglob("*.json"):
            file.unlink()
        plan = lower(program, tuner, 1, tmp_path / "constants", lambda done, total, text: None)
        return [call.kernel.family for call in plan.calls], plan.calls[-1].note

    assert choose({MatMul: 1.0, PackedMatMul: 1.04, SubsetSums: 0.2, TernaryLinear: 0.9}) == (
        ["packed_linear"],
        "measured: dense 1.000 ms, packed 1.040 ms",
    )
    assert choose({MatMul: 1.0, PackedMatMul: 2.0, SubsetSums: 0.2, TernaryLinear: 0.7}) == (
        ["subset_sums", "ternary_linear"],
        "measured: dense 1.000 ms, packed 0.900 ms",
    )
    assert choose({MatMul: 1.0, PackedMatMul: 2.0, SubsetSums: 0.2, TernaryLinear: 0.9}) == (
        ["linear"],
        "measured: dense 1.000 ms, packed 1.100 ms",
    )
