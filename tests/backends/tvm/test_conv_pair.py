"""A convolution and the 1 x 1 convolution that reads it, as one kernel."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
from convolutions import Layer, blocked_operand, draw_geometry, exactly, pack_filters, wide
from harness import (
    ALL_STEPS,
    Array,
    Bounded,
    KernelLibrary,
    apply_steps,
    random_array,
    to_blocked,
    to_plain,
)

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_pair import MOST_SCRATCH, MOST_WEIGHTS, ConvPair
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, choose_tile
from shohin.backends.tvm.kernels.emit import LANES, blocks
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.target import CpuTarget, host_runs

_RELU = Step("relu")
_RESIDUAL = Step("add", operand="full")
_PROCESSORS = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]


def _pair(
    *,
    size: tuple[int, int] = (5, 9),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
    channels: int = 16,
    middle: int = 16,
    filters: int = 16,
    tiles: tuple[ConvTile, ConvTile] | None = None,
    steps: tuple[Step, ...] = (),
    registers: int = 7,
    output_blocks: int = 0,
) -> ConvPair:
    geometry = Geometry(size, kernel, stride, padding, dilation)
    width, middle_blocks = geometry.output_size[1], blocks(middle)
    plain = channels <= 4
    first = Conv2d(
        batch=batch,
        channels=channels if plain else blocks(channels) * LANES,
        filters=middle_blocks * LANES,
        geometry=geometry,
        groups=1,
        plain_input=plain,
        tile=tiles[0] if tiles else choose_tile(width, middle_blocks, registers),
        last_channels=0 if plain else channels % LANES,
    )
    second = Conv2d(
        batch=batch,
        channels=middle_blocks * LANES,
        filters=filters,
        geometry=Geometry(geometry.output_size, (1, 1)),
        groups=1,
        plain_input=False,
        tile=tiles[1] if tiles else choose_tile(width, filters // LANES, registers),
        steps=steps,
        output_blocks=output_blocks,
        last_channels=middle % LANES,
    )
    return ConvPair(first, second)


_CHOSEN = {
    "1x1": _pair(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "3x3": _pair(size=(6, 20), middle=32, filters=48),
    "3x1": _pair(kernel=(3, 1), padding=(1, 1, 0, 0)),
    "1x3": _pair(kernel=(1, 3), padding=(0, 0, 1, 1)),
    "5x5": _pair(kernel=(5, 5), padding=(2, 2, 2, 2)),
    "stride 2, plain": _pair(size=(9, 13), stride=(2, 2), channels=3),
    "stride 3x1, dilation 1x2": _pair(stride=(3, 1), dilation=(1, 2), size=(7, 11)),
    "plain 1, batch 3": _pair(channels=1, batch=3),
    "plain 4, residual": _pair(channels=4, steps=(_RESIDUAL,)),
    "asymmetric padding": _pair(padding=(2, 0, 0, 3), stride=(1, 2)),
    "rows of padding alone": _pair(kernel=(1, 1), padding=(2, 1, 3, 0), size=(2, 3)),
    "ragged channels": _pair(channels=21, middle=16),
    "ragged middle": _pair(middle=5),
    "both ragged, batch 3": _pair(channels=37, middle=41, filters=32, batch=3),
    "residual and relu, batch 3": _pair(steps=(_RESIDUAL, _RELU), batch=3, filters=32),
    "joined, batch 3": _pair(output_blocks=3, batch=3),
    "joined, residual": _pair(output_blocks=5, steps=(_RESIDUAL,), filters=32),
    "one pixel": _pair(size=(1, 1)),
    "different tiles": _pair(
        size=(3, 11), middle=48, filters=32, tiles=(ConvTile(2, 3), ConvTile(5, 1))
    ),
    "the largest scratch, often": _pair(
        size=(60, 64), kernel=(1, 1), padding=(0, 0, 0, 0), middle=256, batch=3
    ),
}


def _draw(seed: int) -> ConvPair:
    choose = random.Random(seed)
    geometry = draw_geometry(choose)
    filters = LANES * choose.randint(1, 3)
    return _pair(
        size=geometry.size,
        kernel=geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        batch=choose.randint(1, 3),
        channels=choose.randint(1, 40),
        middle=choose.randint(1, 40),
        filters=filters,
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 3))),
        registers=choose.choice([30, 7, 3]),
        output_blocks=choose.choice([0, filters // LANES + 2]),
    )


_CASES = {**_CHOSEN, **{f"random {seed}": _draw(seed) for seed in range(10)}}


@dataclass(frozen=True)
class _Data:
    """Random numbers for a pair. What lies in lanes that are not in use must not matter."""

    x: Array
    first: Layer
    second: Layer
    operands: list[Array]

    def expected(self, steps: tuple[Step, ...]) -> Bounded:
        sums = self.second.sums(self.first.sums(exactly(self.x)))
        return apply_steps(steps, sums, [wide(array) for array in self.operands])

    def inputs(self, pair: ConvPair) -> list[Array]:
        x, first, second = self.x, pair.first, pair.second
        if not first.plain_input:
            x = to_blocked(_filled(x, first.channels, 1, np.nan))
        return [
            x,
            *_packed(self.first, first),
            *_packed(self.second, second),
            *(blocked_operand(array) for array in self.operands),
        ]


def _data(pair: ConvPair) -> _Data:
    generator = np.random.default_rng(5)
    first, second = pair.first, pair.second
    channels, middle = _in_use(first), _in_use(second)
    full = (first.batch, second.filters, *second.geometry.output_size)

    def layer(filters: int, channels: int, geometry: Geometry) -> Layer:
        weight = random_array(generator, filters, channels, *geometry.kernel)
        return Layer(weight, random_array(generator, filters), geometry)

    return _Data(
        random_array(generator, first.batch, channels, *first.geometry.size),
        layer(middle, channels, first.geometry),
        layer(second.filters, middle, second.geometry),
        [
            random_array(generator, *(full if step.operand == "full" else full[1:2]))
            for step in second.steps
            if step.operand != "none"
        ],
    )


def _in_use(conv: Conv2d) -> int:
    return conv.channels - LANES + conv.last_channels if conv.last_channels else conv.channels


def _filled(array: Array, size: int, axis: int, value: float) -> Array:
    widths = [(0, size - array.shape[i] if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths, constant_values=value)


def _packed(layer: Layer, conv: Conv2d) -> tuple[Array, Array]:
    weight = _filled(_filled(layer.weight, conv.channels, 1, 0.0), conv.filters, 0, 0.0)
    return pack_filters(weight, conv), _filled(layer.bias, conv.filters, 0, np.nan)


def _run(library: KernelLibrary, pair: ConvPair, data: _Data) -> Array:
    found = library.run(pair, data.inputs(pair))
    assert found.shape == pair.second.stored_shape()
    written = pair.second.filters // LANES
    assert np.isnan(found[:, written:]).all(), "wrote beside its part"
    return to_plain(found, pair.second.filters)


def _target(arch: str) -> CpuTarget:
    if host_runs(arch):
        pytest.skip(host_runs(arch))
    return CpuTarget(arch)


@pytest.fixture(scope="module", params=_PROCESSORS)
def library(request: pytest.FixtureRequest) -> KernelLibrary:
    return KernelLibrary(_CASES.values(), _target(request.param))


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    pair = _CASES[name]
    data = _data(pair)
    data.expected(pair.second.steps).check(_run(library, pair, data))


@pytest.mark.parametrize("arch", _PROCESSORS)
def test_tiles_change_no_number(arch: str) -> None:
    target = _target(arch)
    pair = _pair(size=(3, 11), channels=21, middle=41, filters=32, steps=(_RESIDUAL, _RELU))
    variants = _variants(pair, target.registers(), 7)
    assert len(variants) > 3
    library = KernelLibrary([*variants, pair.first, pair.second], target)
    data = _data(pair)
    found = [_run(library, variant, data) for variant in variants]
    data.expected(pair.second.steps).check(found[0])
    # Every sum is added up in the same order, also by the two kernels that the pair is made of.
    for other in [*found[1:], _one_by_one(library, pair, data)]:
        np.testing.assert_array_equal(other, found[0])


def _variants(pair: ConvPair, *registers: int) -> list[ConvPair]:
    found = [variant for number in registers for variant in pair.variants(number)]
    return [variant for variant in dict.fromkeys(found) if isinstance(variant, ConvPair)]


def _one_by_one(library: KernelLibrary, pair: ConvPair, data: _Data) -> Array:
    x, weight, bias, last_weight, last_bias, *operands = data.inputs(pair)
    middle = library.run(pair.first, [x, weight, bias])
    found = library.run(pair.second, [middle, last_weight, last_bias, *operands])
    return to_plain(found, pair.second.filters)


@pytest.mark.parametrize("registers", [3, 7, 30])
def test_variants_differ_in_their_tiles_alone(registers: int) -> None:
    pair = _pair(size=(28, 28), middle=64, filters=128)
    variants = _variants(pair, registers)
    assert len({variant.tile_text() for variant in variants}) == len(variants) >= 1
    assert {variant.problem() for variant in variants} == {pair.problem()}
    assert {variant.extent for variant in variants} == {28}
    assert {variant.operations for variant in variants} == {pair.operations}


def test_other_steps_are_another_problem() -> None:
    assert _pair().problem() == _pair(tiles=(ConvTile(1, 1), ConvTile(2, 1))).problem()
    assert _pair().problem() != _pair(steps=(_RELU,)).problem()
    assert _pair().problem() != _pair(padding=(1, 1, 1, 0)).problem()


def test_sums_never_wait_in_the_output() -> None:
    pair = _pair(size=(14, 14), kernel=(5, 5), padding=(2, 2, 2, 2), channels=128, middle=64)
    assert pair.fits
    assert any("c" in variant.tile_text() for variant in pair.first.variants(30))
    for variant in _variants(pair, 30):
        assert not variant.first.tile.input_blocks


def _pointwise(width: int, channels: int, middle: int, filters: int) -> ConvPair:
    return _pair(
        size=(2, width),
        kernel=(1, 1),
        padding=(0, 0, 0, 0),
        channels=channels,
        middle=middle,
        filters=filters,
    )


def test_a_row_must_fit_the_scratch_memory() -> None:
    largest = _pointwise(64, channels=16, middle=256, filters=16)
    assert 4 * largest.scratch == MOST_SCRATCH
    assert largest.fits
    assert not _pointwise(65, channels=16, middle=256, filters=16).fits
    assert not _pointwise(64, channels=16, middle=257, filters=16).fits


def test_the_weights_of_both_must_be_few() -> None:
    largest = _pointwise(8, channels=256, middle=512, filters=256)
    assert MOST_WEIGHTS == 4 * 512 * (256 + 256)
    assert all(variant.fits for variant in [largest, *_variants(largest, 3, 30)])
    assert not _pointwise(8, channels=256, middle=512, filters=272).fits
    assert not _pointwise(8, channels=257, middle=512, filters=256).fits
