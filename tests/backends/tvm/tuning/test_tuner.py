from collections.abc import Sequence
from pathlib import Path

import pytest

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, tile_options
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.matmul import MatMul, MatrixTile, matrix_tile_options
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning import tuner as module
from shohin.backends.tvm.tuning.cache import Measurement, TuningCache
from shohin.backends.tvm.tuning.measure import measure_kernels
from shohin.backends.tvm.tuning.tuner import VARIANTS, Tuner

CONV = Conv2d(
    1, 32, 64, Geometry((28, 28), (3, 3), (1, 1), (1, 1, 1, 1)), 1, False, ConvTile(14, 2)
)
SMALL = MatMul(1, 1, 8, 16, True, False, MatrixTile(1, 1))


def _quiet(done: int, total: int, label: str) -> None:
    """No progress wanted."""


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path / "tuning")


def _pretend(monkeypatch: pytest.MonkeyPatch, favourite: str) -> list[str]:
    """Measurements in which one tile is the fastest; gives what was measured."""
    asked: list[str] = []

    def measure(kernels: Sequence[Kernel], target: CpuTarget) -> list[float]:
        asked.extend(kernel.tile_text() for kernel in kernels)
        return [1.0 if kernel.tile_text() == favourite else 2.0 for kernel in kernels]

    monkeypatch.setattr(module, "measure_kernels", measure)
    return asked


def test_the_fastest_variant_is_chosen_and_kept(
    cache: TuningCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = CpuTarget(arch="native", tune="quick")
    options = [v.tile_text() for v in CONV.variants(target.registers())]
    asked = _pretend(monkeypatch, options[2])
    tuner = Tuner(target, cache)
    assert tuner.choose(CONV).tile_text() == options[0]
    tuner.measure(_quiet)
    assert asked == options[: VARIANTS["quick"]]
    assert tuner.choose(CONV).tile_text() == options[2]
    again = Tuner(target, cache)
    assert again.choose(CONV).tile_text() == options[2]
    assert not again.missing


def test_full_measures_what_quick_left_out(
    cache: TuningCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Processors of few registers have no more variants than a quick search measures.
    monkeypatch.setitem(VARIANTS, "quick", 2)
    quick, full = (Tuner(CpuTarget(tune=tune), cache) for tune in ("quick", "full"))
    asked = _pretend(monkeypatch, "none")
    quick.choose(CONV)
    quick.measure(_quiet)
    del asked[:]
    full.choose(CONV)
    full.measure(_quiet)
    everything = [v.tile_text() for v in CONV.variants(full.target.registers())]
    assert asked == everything[: VARIANTS["full"]]
    known = cache.read(CONV, full.target)
    assert known is not None
    assert set(known.milliseconds) == set(asked)


def test_off_and_small_kernels_are_not_measured(cache: TuningCache) -> None:
    off = Tuner(CpuTarget(tune="off"), cache)
    assert off.choose(CONV).tile_text() == CONV.variants(off.target.registers())[0].tile_text()
    quick = Tuner(CpuTarget(tune="quick"), cache)
    quick.choose(SMALL)
    assert not off.missing
    assert not quick.missing


def test_code_for_another_processor_is_not_measured(
    cache: TuningCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "host_runs", lambda processor: "this machine lacks avx2")
    tuner = Tuner(CpuTarget(arch="x86-64-v3", tune="full"), cache)
    tuner.choose(CONV)
    assert tuner.tune == "off"
    assert not tuner.missing


def test_an_unreadable_entry_counts_as_missing(cache: TuningCache) -> None:
    target = CpuTarget(tune="quick")
    cache.write(CONV, target, Measurement({"14x2": 1.0}))
    (path,) = cache.folder.rglob("*.json")
    for content in ("", "[]", '{"milliseconds": {"14x2": "fast"}}', '{"other": 1}'):
        path.write_text(content)
        assert cache.read(CONV, target) is None


def test_entries_are_kept_apart_by_shape_and_processor(cache: TuningCache) -> None:
    native, level = CpuTarget(tune="quick"), CpuTarget(arch="x86-64-v2", tune="quick")
    cache.write(CONV, native, Measurement({"14x2": 1.0}))
    assert cache.read(CONV, level) is None
    assert cache.read(SMALL, native) is None
    wider = Conv2d(1, 32, 128, CONV.geometry, 1, False, CONV.tile)
    assert cache.read(wider, native) is None


def test_variants_differ_in_the_tile_alone() -> None:
    for kernel in (CONV, MatMul(1, 65, 64, 200, True, True, MatrixTile(6, 2))):
        variants = kernel.variants(28)
        assert len({variant.tile_text() for variant in variants}) == len(variants) > 3
        assert {variant.problem() for variant in variants} == {kernel.problem()}
        assert {variant.extent > 0 for variant in variants} == {True}


@pytest.mark.parametrize("registers", [3, 7, 30])
def test_tiles_fit_the_registers(registers: int) -> None:
    for width in (1, 7, 14, 55, 224):
        for blocks in (1, 2, 3, 8, 63):
            for tile in tile_options(width, blocks, registers):
                assert (tile.width + 1) * tile.channel_blocks <= registers
                assert blocks % tile.channel_blocks == 0
    for rows in (1, 5, 65, 1000):
        for columns in (1, 10, 100, 1000):
            for tile in matrix_tile_options(rows, columns, registers):
                assert tile.rows * tile.column_blocks * tile.splits <= max(registers, 1)


def test_real_measurements_are_positive_and_in_order() -> None:
    target = CpuTarget(tune="quick")
    variants = CONV.variants(target.registers())[:2]
    times = measure_kernels([*variants, SMALL], target)
    assert len(times) == 3
    assert all(time > 0 for time in times)
    assert times[2] < min(times[:2])
