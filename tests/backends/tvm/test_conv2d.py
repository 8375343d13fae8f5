import random
from dataclasses import replace

import pytest
from convolutions import check_convolution, draw_geometry
from harness import ALL_STEPS, KernelLibrary

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, choose_tile
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.target import CpuTarget

_RELU = Step("relu")
_RESIDUAL = Step("add", operand="full")


def _conv(
    *,
    size: tuple[int, int] = (6, 20),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
    channels: int = 16,
    filters: int = 32,
    groups: int = 1,
    tile: ConvTile | None = None,
    steps: tuple[Step, ...] = (),
    registers: int = 30,
    last: int = 0,
    output_blocks: int = 0,
) -> Conv2d:
    geometry = Geometry(size, kernel, stride, padding, dilation)
    width = geometry.output_size[1]
    return Conv2d(
        batch=batch,
        channels=channels,
        filters=filters,
        geometry=geometry,
        groups=groups,
        plain_input=channels <= 4,
        tile=tile or choose_tile(width, filters // LANES // groups, registers),
        steps=steps,
        last_channels=last,
        output_blocks=output_blocks,
    )


_CHOSEN = {
    "cut in two": _conv(channels=32, tile=ConvTile(7, 2, 2, 1)),
    "cut unevenly, ragged rows": _conv(
        size=(7, 9), channels=80, tile=ConvTile(5, 1, 3, 2), steps=ALL_STEPS[:2]
    ),
    "cut, one row group": _conv(size=(5, 7), channels=48, tile=ConvTile(7, 2, 5, 1), batch=2),
    "cut, groups, strided": _conv(
        channels=64, filters=64, groups=2, stride=(2, 2), tile=ConvTile(3, 1, 2, 1)
    ),
    "cut, residual": _conv(channels=32, tile=ConvTile(7, 2, 4, 1), steps=(_RESIDUAL,), batch=2),
    "few channels of one block": _conv(last=5),
    "few channels of the last block": _conv(channels=48, last=8, size=(5, 13)),
    "few channels, cut": _conv(channels=48, last=3, tile=ConvTile(6, 2, 3, 2)),
    "part of a concatenation": _conv(output_blocks=5, batch=3),
    "part of a concatenation, residual": _conv(output_blocks=3, batch=2, steps=(_RESIDUAL,)),
    "1x1": _conv(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "1x1 padded": _conv(kernel=(1, 1)),
    "1x1 stride 2": _conv(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2)),
    "3x3": _conv(),
    "5x5": _conv(kernel=(5, 5), padding=(2, 2, 2, 2)),
    "7x7 stride 2 plain": _conv(
        kernel=(7, 7), padding=(3, 3, 3, 3), stride=(2, 2), channels=3, size=(18, 37)
    ),
    "11x11 stride 4 plain": _conv(
        kernel=(11, 11), padding=(2, 2, 2, 2), stride=(4, 4), channels=3, size=(27, 43)
    ),
    "1x7": _conv(kernel=(1, 7), padding=(0, 0, 3, 3)),
    "7x1": _conv(kernel=(7, 1), padding=(3, 3, 0, 0)),
    "5x2 even": _conv(kernel=(5, 2), padding=(2, 2, 0, 1)),
    "stride 3x1": _conv(stride=(3, 1)),
    "stride 1x4": _conv(stride=(1, 4), size=(4, 41)),
    "padding top only": _conv(padding=(2, 0, 0, 0)),
    "padding bottom only": _conv(padding=(0, 2, 0, 0)),
    "padding left only": _conv(padding=(0, 0, 2, 0)),
    "padding right only": _conv(padding=(0, 0, 0, 2)),
    "padding beyond the kernel": _conv(padding=(4, 5, 5, 4), size=(3, 4)),
    "padding beyond every tap": _conv(kernel=(1, 1), padding=(2, 2, 2, 2), size=(2, 2)),
    "padding with stride beyond": _conv(padding=(5, 5, 5, 5), stride=(4, 3), size=(2, 3)),
    "dilation 2": _conv(dilation=(2, 2), padding=(2, 2, 2, 2)),
    "dilation 3x1": _conv(dilation=(3, 1), padding=(3, 3, 1, 1)),
    "dilation beyond the image": _conv(dilation=(5, 7), padding=(5, 5, 7, 7), size=(4, 6)),
    "dilation 2 stride 2": _conv(dilation=(2, 2), stride=(2, 2), padding=(2, 1, 0, 3)),
    "one pixel": _conv(size=(1, 1)),
    "one column": _conv(size=(9, 1)),
    "one row": _conv(size=(1, 40)),
    "row narrower than the tile": _conv(size=(4, 5), tile=ConvTile(14, 2)),
    "row of one tile": _conv(size=(4, 14), tile=ConvTile(14, 2)),
    "ragged tail of one pixel": _conv(size=(4, 29), tile=ConvTile(14, 2)),
    "ragged tail, no interior": _conv(size=(4, 17), tile=ConvTile(14, 2)),
    "tail behind the interior": _conv(size=(4, 45), tile=ConvTile(7, 1)),
    "tail without padding": _conv(size=(5, 31), tile=ConvTile(7, 2), padding=(0, 0, 0, 0)),
    "tiles of one pixel": _conv(size=(4, 6), tile=ConvTile(1, 1)),
    "wide tile": _conv(size=(3, 57), tile=ConvTile(28, 1)),
    "four blocks": _conv(filters=64, tile=ConvTile(6, 4)),
    "groups": _conv(channels=64, filters=64, groups=2),
    "groups, uneven": _conv(channels=32, filters=96, groups=2, tile=ConvTile(5, 3)),
    "groups of one block": _conv(channels=64, filters=64, groups=4),
    "batch 3 and groups": _conv(batch=3, channels=32, filters=64, groups=2),
    "batch 2": _conv(batch=2),
    "batch 3, plain": _conv(batch=3, channels=3),
    "plain 1": _conv(channels=1),
    "plain 2": _conv(channels=2, stride=(2, 2)),
    "plain 4": _conv(channels=4, padding=(1, 0, 0, 1)),
    "many channels": _conv(channels=128, filters=16),
    "7 registers": _conv(registers=7),
    "3 registers": _conv(registers=3),
    "7 registers, many filters": _conv(filters=128, registers=7, size=(3, 13)),
    "residual": _conv(steps=(_RESIDUAL, _RELU), batch=2, stride=(2, 2)),
    "two residuals": _conv(steps=(_RESIDUAL, _RELU, Step("multiply", operand="full"))),
    "chain": _conv(
        steps=(
            Step("multiply", operand="channel"),
            Step("add", operand="channel"),
            Step("silu"),
            _RESIDUAL,
            Step("clamp", (0.0, 6.0)),
        ),
        filters=64,
    ),
}
_STEPS = {
    f"step {step.kind} {step.operand}": _conv(size=(3, 9), steps=(step,)) for step in ALL_STEPS
}


def _draw(seed: int) -> Conv2d:
    choose = random.Random(seed)
    geometry = draw_geometry(choose)
    groups = choose.choice([1, 1, 1, 2])
    channels = choose.choice([1, 2, 3, 4, 16, 32, 48]) if groups == 1 else 32 * groups
    filters = 16 * groups * choose.randint(1, 4)
    steps = tuple(choose.sample(ALL_STEPS, choose.randint(0, 3)))
    height, width = geometry.output_size
    tile = choose_tile(width, filters // LANES // groups, choose.choice([30, 7, 3]))
    blocks = 1 if channels <= 4 else channels // LANES // groups
    if channels > 4 and choose.random() < 0.4:
        tile = replace(tile, rows=choose.randint(1, height), input_blocks=choose.randint(1, blocks))
    return Conv2d(
        batch=choose.randint(1, 3),
        channels=channels,
        filters=filters,
        geometry=geometry,
        groups=groups,
        plain_input=channels <= 4,
        tile=tile,
        steps=steps,
        output_blocks=choose.choice([0, 0, filters // LANES + 2]),
        last_channels=choose.randint(0, 15) if channels > 4 and groups == 1 else 0,
    )


_CASES = {**_CHOSEN, **_STEPS, **{f"random {seed}": _draw(seed) for seed in range(40)}}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES.values())


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    check_convolution(library, _CASES[name])


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_narrower_vectors(arch: str) -> None:
    target = CpuTarget(arch)
    kernels = [
        _conv(size=(3, 9), registers=target.registers(), steps=(_RESIDUAL, Step("tanh"))),
        _conv(size=(3, 9), registers=target.registers(), channels=3, stride=(2, 2)),
    ]
    library = KernelLibrary(kernels, target)
    for kernel in kernels:
        check_convolution(library, kernel)


@pytest.mark.parametrize("registers", [30, 7, 3])
@pytest.mark.parametrize("filter_blocks", [1, 2, 3, 4, 5, 7, 8, 12, 32])
def test_chosen_tiles_fit(filter_blocks: int, registers: int) -> None:
    for width in range(1, 230):
        tile = choose_tile(width, filter_blocks, registers)
        assert (tile.width + 1) * tile.channel_blocks <= registers
        assert filter_blocks % tile.channel_blocks == 0
        assert 1 <= tile.width <= width


def test_equal_kernels_are_one() -> None:
    assert _conv() == _conv()
    assert hash(_conv()) == hash(_conv())
    assert _conv() != _conv(stride=(1, 2))


def test_weights_larger_than_a_cache_are_cut() -> None:
    large = _conv(size=(7, 7), channels=512, filters=512, tile=ConvTile(4, 4))
    tiles = [variant.tile for variant in large.variants(30)]
    assert tiles[0].rows == 7
    assert tiles[0].input_blocks == 8
    assert replace(tiles[0], rows=1, input_blocks=0) == tiles[1]
    assert tiles[0].text() == f"{tiles[0].width}x{tiles[0].channel_blocks}/7r8c"
    small = _conv(size=(7, 7), channels=64, filters=64)
    assert all(variant.tile.input_blocks == 0 for variant in small.variants(30))
