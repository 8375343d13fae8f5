"""Every choice of a tile is explained."""

from pathlib import Path

import pytest

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import ConvTile
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.matmul import MatMul, MatrixTile
from shohin.backends.tvm.kernels.pool import GlobalAverage
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning.cache import Measurement, TuningCache
from shohin.backends.tvm.tuning.explain import explain
from shohin.backends.tvm.tuning.tuner import VARIANTS, Tuner

CONV = Conv2d(
    1, 32, 64, Geometry((28, 28), (3, 3), (1, 1), (1, 1, 1, 1)), 1, False, ConvTile(14, 2)
)


@pytest.fixture
def cache(tmp_path: Path) -> TuningCache:
    return TuningCache(tmp_path)


def test_a_measured_choice(cache: TuningCache) -> None:
    target = CpuTarget(tune="quick")
    tiles = [v.tile_text() for v in CONV.variants(target.registers())][: VARIANTS["quick"]]
    times = {tile: 0.2 + index / 10 for index, tile in enumerate(tiles)}
    times[tiles[2]] = 0.1
    cache.write(CONV, target, Measurement(times))
    choice = explain(CONV, Tuner(target, cache))
    assert choice.tile == tiles[2]
    assert choice.candidates == tuple(times.items())
    assert choice.reason == (
        f"fastest of {len(tiles)} measured: 0.1000 ms; the cost model's favourite 0.2000 ms, "
        f"the slowest {max(times.values()):.4f} ms"
    )


def test_what_was_not_measured(cache: TuningCache) -> None:
    small = MatMul(1, 1, 8, 64, True, False, MatrixTile(1, 1))
    reasons = [
        explain(CONV, Tuner(CpuTarget(tune="quick"), cache)).reason,
        explain(CONV, Tuner(CpuTarget(tune="off"), cache)).reason,
        explain(small, Tuner(CpuTarget(tune="quick"), cache)).reason,
        explain(GlobalAverage(1, 4, 49), Tuner(CpuTarget(tune="quick"), cache)).reason,
    ]
    assert reasons == [
        "cost model: not measured yet",
        "cost model: tuning is off",
        "cost model: 512 operations are too few to matter",
        "there is one tile",
    ]


def test_a_foreign_processor(cache: TuningCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "shohin.backends.tvm.target._host_flags", lambda: frozenset({"sse4_2", "ssse3", "sse4_1"})
    )
    choice = explain(CONV, Tuner(CpuTarget("x86-64-v3", tune="quick"), cache))
    assert choice.reason == "cost model: this machine lacks avx2, bmi2, fma, movbe"
