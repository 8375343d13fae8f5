"""Sparse convolutions and the layout they work in."""

import ctypes
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from convolutions import draw_geometry, padded, wide
from harness import (
    ALL_STEPS,
    Array,
    Guarded,
    KernelLibrary,
    apply_steps,
    link_functions,
    random_array,
    sum_of_products,
    to_blocked,
)
from torch.nn import functional

from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.exchange import Exchange
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.plane_layout import FromPlanes, ToPlanes
from shohin.backends.tvm.kernels.plane_pool import PlanePool, pools_in_planes
from shohin.backends.tvm.kernels.planes import Planes, cut, register_tiles
from shohin.backends.tvm.kernels.sparse_conv2d import (
    SparseConv2d,
    SparseTile,
    needed_planes,
)
from shohin.backends.tvm.target import CpuTarget

_RESIDUAL = Step("add", operand="full")


def _to_planes(x: Array, planes: Planes, border: float | None = None) -> Array:
    """Images as planes, pixel by pixel; `border` is what the frames hold instead of pixels."""
    batch, channels, height, width = x.shape
    (rows, columns), (down, right) = planes.framed, planes.stride
    fill = 0.0 if border is None else border
    result = np.full((batch, channels, planes.phases, rows, columns, 16), fill, np.float32)
    own = range(planes.border, rows - planes.border), range(planes.border, columns - planes.border)
    for phase, row, column, lane in np.ndindex(planes.phases, rows, columns, 16):
        i = lane // planes.grid[1] * planes.tile[0] + row - planes.border
        j = lane % planes.grid[1] * planes.tile[1] + column - planes.border
        i, j = i * down + phase // right, j * right + phase % right
        framed = row not in own[0] or column not in own[1]
        if 0 <= i < height and 0 <= j < width and not (framed and border is not None):
            result[:, :, phase, row, column, lane] = x[:, :, i, j]
    return result.reshape(planes.shape(batch, channels))


def _own_pixels(planes_array: Array, planes: Planes, channels: int) -> Array:
    """The images that planes of one phase hold, their frames left out."""
    b = planes.border
    (rows, columns), (height, width) = planes.framed, planes.size
    tiles = planes_array.reshape(-1, channels, rows, columns, *planes.grid)
    tiles = tiles[:, :, b : rows - b, b : columns - b]
    image = tiles.transpose(0, 1, 4, 2, 5, 3).reshape(
        tiles.shape[0],
        channels,
        planes.grid[0] * planes.tile[0],
        planes.grid[1] * planes.tile[1],
    )
    return np.ascontiguousarray(image[:, :, :height, :width])


def _conv(
    channels: int = 5,
    filters: int = 7,
    size: tuple[int, int] = (6, 9),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
    density: float = 0.3,
    groups: int = 1,
    border: int = 1,
    tile: SparseTile | None = None,
    steps: tuple[Step, ...] = (),
    planes: Planes | None = None,
) -> SparseConv2d:
    geometry = Geometry(size, kernel, stride, padding, dilation)
    weights = filters * channels * kernel[0] * kernel[1]
    return SparseConv2d(
        batch,
        channels,
        filters,
        geometry,
        planes or needed_planes(geometry),
        border,
        round(density * weights),
        groups,
        tile or SparseTile(1, 1, 2),
        steps,
    )


def _draw(seed: int) -> SparseConv2d:
    choose = random.Random(seed)
    geometry = draw_geometry(choose)
    needed = needed_planes(geometry)
    shape = choose.choice(sorted(register_tiles(needed.tile, 16)))
    filters = choose.randint(1, 8)
    return _conv(
        channels=choose.randint(1, 9),
        filters=filters,
        size=geometry.size,
        kernel=geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        batch=choose.randint(1, 3),
        density=choose.choice([0.0, 0.05, 0.3, 1.0]),
        groups=choose.randint(1, 3),
        border=choose.randint(0, 2),
        tile=SparseTile(*shape, choose.randint(1, 9), choose.choice([1, 2 - filters % 2])),
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 2))),
        planes=replace(needed, border=needed.border + choose.randint(0, 2)),
    )


_CASES = {
    "3x3": _conv(),
    "all channels at once": _conv(tile=SparseTile(1, 1, 16)),
    "several pixels together": _conv(size=(16, 24), tile=SparseTile(2, 6, 3)),
    "a row together": _conv(size=(28, 28), tile=SparseTile(1, 7, 3)),
    "large tiles": _conv(size=(56, 56), channels=3, filters=2, tile=SparseTile(1, 14, 3)),
    "no weights": _conv(density=0.0),
    "all weights": _conv(density=1.0),
    "no border": _conv(border=0),
    "1x1": _conv(kernel=(1, 1), padding=(0, 0, 0, 0), border=0),
    "stride 2": _conv(stride=(2, 2), size=(9, 11)),
    "stride 2, 1x1": _conv(kernel=(1, 1), stride=(2, 2), padding=(0, 0, 0, 0)),
    "without padding": _conv(kernel=(5, 5), padding=(0, 0, 0, 0), size=(9, 12)),
    "residual": _conv(steps=(_RESIDUAL, Step("relu")), batch=2),
    "groups of filters": _conv(filters=11, groups=4, tile=SparseTile(1, 1, 5)),
    "more groups than filters": _conv(filters=2, groups=4),
    "pairs": _conv(filters=6, tile=SparseTile(1, 1, 2, 2)),
    "pairs that share much": _conv(
        size=(28, 28), filters=4, density=0.8, tile=SparseTile(1, 7, 5, 2)
    ),
    "pairs that share everything": _conv(filters=4, density=1.0, tile=SparseTile(1, 1, 3, 2)),
    "pairs without weights": _conv(filters=4, density=0.0, tile=SparseTile(1, 1, 3, 2)),
    "pairs in groups": _conv(filters=12, groups=4, tile=SparseTile(1, 1, 5, 2)),
    "pairs of large tiles": _conv(size=(56, 56), filters=2, tile=SparseTile(1, 14, 3, 2)),
    "pairs, stride 2": _conv(filters=8, stride=(2, 2), size=(9, 11), tile=SparseTile(1, 1, 4, 2)),
    "wide distances": _conv(channels=30, size=(160, 180), tile=SparseTile(1, 1, 20)),
    **{f"step {s.kind} {s.operand}": _conv(size=(3, 9), steps=(s,)) for s in ALL_STEPS},
    **{f"random {seed}": _draw(seed) for seed in range(40)},
}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES.values())


def _weight(kernel: SparseConv2d, generator: np.random.Generator) -> Array:
    shape = (kernel.filters, kernel.channels, *kernel.geometry.kernel)
    weight = np.zeros(int(np.prod(shape)), np.float32)
    chosen = generator.permutation(weight.size)[: kernel.nonzeros]
    weight[chosen] = random_array(generator, chosen.size) + 0.01
    return weight.reshape(shape)


def _check(library: KernelLibrary, kernel: SparseConv2d) -> None:
    generator = np.random.default_rng(3)
    geometry = kernel.geometry
    x = random_array(generator, kernel.batch, kernel.channels, *geometry.size)
    weight = _weight(kernel, generator)
    bias = random_array(generator, kernel.filters)
    full = (kernel.batch, kernel.filters, *geometry.output_size)
    operands = [
        random_array(generator, *(full if step.operand == "full" else (kernel.filters,)))
        for step in kernel.steps
        if step.operand != "none"
    ]
    image, taps, shift = (torch.from_numpy(array).double() for array in (x, weight, bias))

    def convolve(image: torch.Tensor, taps: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(
            padded(image, geometry.padding),
            taps,
            shift,
            geometry.stride,
            dilation=geometry.dilation,
        )

    sums = sum_of_products(
        convolve(image, taps, shift),
        convolve(image.abs(), taps.abs(), shift.abs()),
        terms=weight[0].size + 1,
    )
    expected = apply_steps(kernel.steps, sums, [wide(array) for array in operands])
    lists = kernel.pack(weight)
    given = [_to_planes(x, kernel.source)]
    given += [lists[name] for name in ("value", "distance", "start", "group")]
    given += [bias]
    given += [
        _to_planes(array, kernel.result, np.nan) if array.ndim == 4 else array for array in operands
    ]
    found = library.run(kernel, given)
    expected.check(_own_pixels(found, kernel.result, kernel.filters))


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    _check(library, _CASES[name])


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_narrower_vectors(arch: str) -> None:
    target = CpuTarget(arch)
    kernels = [_conv(size=(16, 24), tile=SparseTile(2, 6, 4)), _conv(stride=(2, 2), size=(9, 11))]
    library = KernelLibrary(kernels, target)
    for kernel in kernels:
        _check(library, kernel)


@pytest.mark.parametrize("together", [1, 2])
def test_groups_have_equal_work(together: int) -> None:
    tile = SparseTile(1, 1, 2, together)
    kernel = _conv(channels=64, filters=64, density=0.1, groups=4, tile=tile)
    weight = _weight(kernel, np.random.default_rng(0))
    weight[:8] = 1.0
    kernel = replace(kernel, nonzeros=int(np.count_nonzero(weight)))
    bounds = kernel.pack(weight)["group"].astype(int)
    counts = np.count_nonzero(weight.reshape(64 // together, -1), axis=1)
    work = [counts[low:high].sum() for low, high in pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == 64 // together
    assert max(work) - min(work) <= 2 * counts.max()


def test_weights_at_the_same_place_are_read_together() -> None:
    kernel = _conv(channels=2, filters=2, kernel=(1, 1), density=0.75, tile=SparseTile(1, 1, 2, 2))
    lists = kernel.pack(np.array([[1.0, 2.0], [3.0, 0.0]], np.float32).reshape(2, 2, 1, 1))
    assert lists["start"].tolist() == [0, 2, 3, 3]
    assert lists["value"].tolist() == [1.0, 3.0, 2.0]
    first, again, other = lists["distance"].tolist()
    assert first == again
    assert other == first + kernel.source.phases * kernel.source.plane


def test_pairs_are_tried_where_registers_suffice() -> None:
    def together(filters: int, registers: int) -> set[int]:
        variants = _conv(channels=64, filters=filters, size=(28, 28)).variants(registers)
        return {variant.tile.filters for variant in variants}

    assert together(64, 30) == {1, 2}
    assert together(63, 30) == {1}
    assert together(64, 7) == {1}


def test_samples_have_the_kernels_shapes() -> None:
    for kernel in _CASES.values():
        sample = kernel.sample()
        for parameter in kernel.parameters():
            if parameter.name in sample:
                assert sample[parameter.name].shape == parameter.shape
                assert str(sample[parameter.name].dtype) == parameter.dtype


_LAYOUTS = [
    (2, 5, Planes((6, 9), (4, 4), 0, (2, 3))),
    (1, 20, Planes((6, 9), (4, 4), 1, (2, 3))),
    (1, 16, Planes((5, 33), (1, 16), 2, (5, 3))),
    (2, 3, Planes((7, 9), (4, 4), 1, (1, 2), (2, 2))),
    (1, 18, Planes((7, 10), (2, 8), 1, (4, 1), (1, 3))),
    (1, 33, Planes((1, 1), (4, 4), 0, (1, 1))),
    (1, 4, Planes((14, 14), (4, 4), 3, (4, 4))),
]


@pytest.mark.parametrize("source", ["plain", "blocked"])
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_to_planes(layout: tuple[int, int, Planes], source: str) -> None:
    batch, channels, planes = layout
    kernel = ToPlanes(batch, channels, planes, source)  # type: ignore[arg-type]
    x = random_array(np.random.default_rng(1), batch, channels, *planes.size)
    found = KernelLibrary([kernel]).run(kernel, [to_blocked(x) if source == "blocked" else x])
    np.testing.assert_array_equal(found, _to_planes(x, planes))


@pytest.mark.parametrize("target", ["plain", "blocked"])
@pytest.mark.parametrize("layout", [one for one in _LAYOUTS if one[2].phases == 1])
def test_from_planes(layout: tuple[int, int, Planes], target: str) -> None:
    batch, channels, planes = layout
    kernel = FromPlanes(batch, channels, planes, target)  # type: ignore[arg-type]
    x = random_array(np.random.default_rng(1), batch, channels, *planes.size)
    found = KernelLibrary([kernel]).run(kernel, [_to_planes(x, planes, np.nan)])
    expected = to_blocked(x) if target == "blocked" else x
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("border", [1, 2, 3])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (13, 13), (28, 20), (5, 33), (1, 40), (3, 2)])
def test_borders_are_filled_from_the_neighbours(size: tuple[int, int], border: int) -> None:
    grid, tile = cut(size)
    planes = Planes(size, grid, border, tile)
    kernel = Exchange(2, 3, planes)
    x = random_array(np.random.default_rng(1), 2, 3, *size)
    array = Guarded(kernel.parameters()[0].shape, "float32")
    array.array[...] = _to_planes(x, planes, np.nan).reshape(array.array.shape)
    function = link_functions({"exchange": kernel.build()}, CpuTarget()).exchange
    function(ctypes.c_void_p(array.array.ctypes.data), 0, 2)
    function(ctypes.c_void_p(array.array.ctypes.data), 2, kernel.extent)
    array.check("planes")
    expected = _to_planes(x, planes).reshape(array.array.shape)
    np.testing.assert_array_equal(array.array, expected)


@pytest.mark.parametrize(
    "size", [(7, 7), (13, 13), (14, 14), (27, 27), (56, 56), (224, 224), (1, 8)]
)
def test_cuts_waste_little(size: tuple[int, int]) -> None:
    grid, tile = cut(size)
    assert grid[0] * grid[1] == 16
    assert grid[0] * tile[0] >= size[0]
    assert grid[1] * tile[1] >= size[1]
    assert tile[0] * tile[1] * 16 <= max(1.35 * size[0] * size[1], 16)


@pytest.mark.parametrize("mode", ["max", "average"])
@pytest.mark.parametrize(("size", "window"), [((56, 56), (2, 2)), ((48, 32), (2, 2))])
def test_pools_inside_of_tiles(size: tuple[int, int], window: tuple[int, int], mode: str) -> None:
    grid, tile = cut(size)
    planes = Planes(size, grid, 1, tile)
    assert pools_in_planes(planes, window)
    kernel = PlanePool(mode, 2, 3, planes, window, 1)  # type: ignore[arg-type]
    x = random_array(np.random.default_rng(1), 2, 3, *size)
    found = KernelLibrary([kernel]).run(kernel, [_to_planes(x, planes, np.nan)])
    image = torch.from_numpy(x)
    pool = functional.max_pool2d if mode == "max" else functional.avg_pool2d
    expected = pool(image, window).numpy()
    np.testing.assert_allclose(_own_pixels(found, kernel.result, 3), expected, rtol=1e-6)


def test_uneven_tiles_are_not_pooled_in_planes() -> None:
    for size in [(28, 28), (14, 14), (13, 13), (27, 30)]:
        grid, tile = cut(size)
        assert not pools_in_planes(Planes(size, grid, 0, tile), (2, 2))
