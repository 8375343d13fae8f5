"""Convolution with few weights: every one of them costs, and nothing else.

Images are planes of vectors (see `planes`), so a weight is a number and a distance: one broadcast,
and one multiply-add from memory for each vector of pixels. The weights are sorted by chunks of
input channels, so that the pixels a tile reads stay in the first level cache while all filters go
over them; sums wait in the output from chunk to chunk. One work item is a tile of pixels and a
group of filters; groups have about equally many weights.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import either
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    ceil_div,
    local,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.groups import even_groups
from shohin.backends.tvm.kernels.planes import Planes, cut, register_tiles

_NEAR_CACHE = 24_000
"""Bytes of pixels that stay in a first level cache of 32 KiB beside weights and sums."""


@dataclass(frozen=True)
class SparseTile:
    """How a sparse convolution is cut.

    Attributes:
        rows: rows of pixels whose sums are in registers together.
        columns: columns of them.
        channels: input channels of a chunk.
    """

    rows: int
    columns: int
    channels: int


@dataclass(frozen=True)
class SparseConv2d(Kernel):
    """A convolution whose weights are lists, with fused bias and element-wise steps.

    Attributes:
        batch: images.
        channels: input channels.
        filters: output channels.
        geometry: sizes, stride, padding, dilation.
        source: where the input's pixels are; its grid is one of the output's pixels.
        border: width of the frame left around the result's tiles, which `Exchange` fills.
        nonzeros: weights.
        groups: groups of filters that are separate work items.
        tile: how it is cut.
        steps: element-wise steps on the result.
    """

    batch: int
    channels: int
    filters: int
    geometry: Geometry
    source: Planes
    border: int
    nonzeros: int
    groups: int
    tile: SparseTile
    steps: tuple[Step, ...] = ()

    tiling = frozenset({"tile"})

    @property
    def family(self) -> str:
        """``sparse_conv2d``."""
        return "sparse_conv2d"

    @property
    def result(self) -> Planes:
        """Where the output's pixels are: in the same tiles as the input's."""
        source = self.source
        return Planes(self.geometry.output_size, source.grid, self.border, source.tile)

    @property
    def chunks(self) -> int:
        """Chunks of input channels."""
        return ceil_div(self.channels, self.tile.channels)

    @property
    def tiles(self) -> tuple[int, int]:
        """Tiles of registers down and across a tile of the grid, without a rest."""
        rows, columns = self.source.tile
        return rows // self.tile.rows, columns // self.tile.columns

    @property
    def extent(self) -> int:
        """Images times groups of filters times tiles."""
        return self.batch * self.groups * self.tiles[0] * self.tiles[1]

    @property
    def operations(self) -> int:
        """Multiply-accumulates, and the passes over the sums."""
        pixels = self.tiles[0] * self.tiles[1] * self.tile.rows * self.tile.columns * LANES
        return self.batch * pixels * (self.nonzeros + self.filters * self.chunks * 2)

    @property
    def narrow(self) -> bool:
        """Whether distances inside a chunk fit 16 bits."""
        return self.tile.channels * self.source.phases * self.source.plane <= 1 << 16

    def variants(self, registers: int) -> "tuple[SparseConv2d, ...]":
        """Tiles of the pixels that fit the registers, and larger and smaller chunks."""
        most = 16 if registers > 16 else max(1, registers - 2)
        shapes = register_tiles(self.source.tile, most)
        chunks = sorted({min(self.channels, size) for size in (8, 12, 16, 32, 64)})
        options = [SparseTile(*shape, size) for shape in shapes for size in chunks]
        ordered = sorted(options, key=lambda tile: (self._cost(tile), repr(tile)))
        return tuple(replace(self, tile=tile) for tile in ordered)

    def _cost(self, tile: SparseTile) -> float:
        """Cycles of all tiles, roughly."""
        rows, columns = self.source.tile
        tiles = rows // tile.rows * (columns // tile.columns)
        vectors = tile.rows * tile.columns
        down, across = self.geometry.kernel
        reach = (tile.rows + down - 1) * (tile.columns + across - 1)
        window = tile.channels * reach * self.source.phases * LANES * 4
        missing = 1.0 + 0.7 * min(1.0, max(0.0, window / _NEAR_CACHE - 1.0))
        spread = 1.0 + 0.02 * (tile.rows - 1)
        per_weight = max(vectors * missing * spread, 4.0) + 1.5
        passes = self.filters * ceil_div(self.channels, tile.channels)
        return tiles * (self.nonzeros * per_weight + passes * (3.0 * vectors + 25.0))

    def tile_text(self) -> str:
        """Rows, columns, and channels of a chunk."""
        return f"{self.tile.rows}x{self.tile.columns}/{self.tile.channels}c"

    def parameters(self) -> tuple[Parameter, ...]:
        """Planes, values, distances, starts of lists, groups, bias, step operands, planes."""
        result = self.result.shape(self.batch, self.filters)
        return (
            Parameter("x", self.source.shape(self.batch, self.channels)),
            Parameter("value", (max(1, self.nonzeros),)),
            Parameter("distance", (max(1, self.nonzeros),), "uint16" if self.narrow else "int32"),
            Parameter("start", (self.chunks * self.filters + 1,), "int32"),
            Parameter("group", (self.groups + 1,), "int32"),
            Parameter("bias", (self.filters,)),
            *operand_parameters(self.steps, result, self.filters),
            Parameter("y", result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One tile of one group of filters."""
        _TileEmitter(self, item, buffers).emit()

    def sample(self) -> dict[str, Array]:
        """Weights spread evenly, to measure with."""
        generator = np.random.default_rng(0)
        rows, columns = self.geometry.kernel
        size = self.filters * self.channels * rows * columns
        weight = np.zeros(size, np.float32)
        weight[generator.permutation(size)[: self.nonzeros]] = 0.5
        return pack_lists(weight.reshape(self.filters, self.channels, rows, columns), self)


def pack_lists(weight: Array, kernel: SparseConv2d) -> dict[str, Array]:
    """Weights as the kernel's lists, by the names of its parameters.

    Args:
        weight: ``[O, C, KH, KW]``; zeros are left out.
        kernel: what will read them.
    """
    filters, channels, rows, columns = weight.shape
    planes, size = kernel.source, kernel.tile.channels
    chunk = np.arange(channels) // size
    weights_of = np.count_nonzero(weight.reshape(filters, -1), axis=1)
    by_chunk = np.moveaxis(weight, 0, 1).reshape(channels, filters, rows * columns)
    values, places, counts = [], [], []
    tap_places = _tap_places(kernel.geometry, planes)
    for number in range(kernel.chunks):
        part = by_chunk[chunk == number].transpose(1, 0, 2)
        found = np.nonzero(part)
        values.append(part[found])
        places.append(found[1] * planes.phases * planes.plane + tap_places[found[2]])
        counts.append(np.bincount(found[0], minlength=filters))
    distances = np.concatenate(places)
    start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return {
        "value": _at_least_one(np.concatenate(values).astype(np.float32)),
        "distance": _at_least_one(distances.astype(np.uint16 if kernel.narrow else np.int32)),
        "start": start.astype(np.int32),
        "group": even_groups(weights_of, kernel.groups),
    }


def _at_least_one(array: Array) -> Array:
    return array if array.size else np.zeros(1, array.dtype)


def _tap_places(geometry: Geometry, planes: Planes) -> NDArray[np.int64]:
    """Distance, in vectors, of each tap's pixel from the output's pixel in the first phase."""
    places = []
    down, right = geometry.stride
    for tap_row in range(geometry.kernel[0]):
        for tap in range(geometry.kernel[1]):
            row = tap_row * geometry.dilation[0] - geometry.padding[0]
            column = tap * geometry.dilation[1] - geometry.padding[2]
            phase = row % down * right + column % right
            places.append(phase * planes.plane + planes.at(row // down, column // right))
    return np.array(places, np.int64)


def needed_planes(geometry: Geometry) -> Planes:
    """The tightest planes that a convolution can read: cut as its output is."""
    down, right = geometry.stride
    rows = [t * geometry.dilation[0] - geometry.padding[0] for t in range(geometry.kernel[0])]
    columns = [t * geometry.dilation[1] - geometry.padding[2] for t in range(geometry.kernel[1])]
    reach = [rows[0] // down, rows[-1] // down, columns[0] // right, columns[-1] // right]
    grid, tile = cut(geometry.output_size)
    return Planes(geometry.size, grid, max(abs(place) for place in reach), tile, geometry.stride)


class _TileEmitter:
    """Emits one work item."""

    def __init__(self, conv: SparseConv2d, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.conv = conv
        self.x, self.value, self.distance, self.start, self.group, self.bias, *rest = buffers
        self.y = rest.pop()
        self.operands = tuple(rest)
        tiles = conv.tiles[0] * conv.tiles[1]
        self.tile = T.floormod(item, tiles)
        self.filter_group = T.floormod(T.floordiv(item, tiles), conv.groups)
        self.image = T.floordiv(item, tiles * conv.groups)

    def emit(self) -> None:
        """All filters of the group over the pixels of the tile."""
        conv = self.conv
        row = T.floordiv(self.tile, conv.tiles[1]) * conv.tile.rows
        column = T.floormod(self.tile, conv.tiles[1]) * conv.tile.columns
        low, high = self.group[self.filter_group], self.group[self.filter_group + 1]
        with T.serial(0, conv.chunks) as chunk, T.serial(0, high - low) as index:
            self._filter(chunk, low + index, row, column)

    def _filter(self, chunk: Expr, filter_: Expr, row: Expr, column: Expr) -> None:
        conv = self.conv
        pixels = [(r, c) for r in range(conv.tile.rows) for c in range(conv.tile.columns)]
        sums = local(len(pixels) * LANES)

        def place(pixel: tuple[int, int]) -> list[Expr]:
            vector = conv.result.at(row + pixel[0], column + pixel[1])
            return [self.image, filter_, vector, ramp(0)]

        def begin() -> None:
            for number in range(len(pixels)):
                store(sums, [ramp(number * LANES)], splat(self.bias[filter_]))

        def go_on() -> None:
            for number, pixel in enumerate(pixels):
                store(sums, [ramp(number * LANES)], self.y[tuple(place(pixel))])

        def wait() -> None:
            for number, pixel in enumerate(pixels):
                store(self.y, place(pixel), sums[ramp(number * LANES)])

        def finish() -> None:
            for number, pixel in enumerate(pixels):
                self._finish(sums[ramp(number * LANES)], filter_, place(pixel))

        one = conv.chunks == 1
        either(one or chunk == 0, begin, go_on)
        self._accumulate(sums, chunk, filter_, row * conv.source.framed[1] + column)
        either(one or chunk == conv.chunks - 1, finish, wait)

    def _accumulate(self, sums: Buffer, chunk: Expr, filter_: Expr, first: Expr) -> None:
        conv = self.conv
        listed = chunk * conv.filters + filter_
        low = self.start[listed]
        chunk_plane = chunk * conv.tile.channels * conv.source.phases
        with T.serial(0, self.start[listed + 1] - low) as index:
            at = local(1, "int32")
            store(at, [0], first + T.cast(self.distance[low + index], "int32"))
            value = splat(self.value[low + index])
            for number in range(conv.tile.rows * conv.tile.columns):
                row, column = divmod(number, conv.tile.columns)
                vector = at[0] + row * conv.source.framed[1] + column
                lane = ramp(number * LANES)
                x = self.x[self.image, chunk_plane, vector, ramp(0)]
                store(sums, [lane], sums[lane] + value * x)

    def _finish(self, total: Expr, filter_: Expr, place: list[Expr]) -> None:
        result = apply_steps(
            self.conv.steps,
            total,
            self.operands,
            lambda buffer: buffer[tuple(place)],
            lambda buffer: splat(buffer[filter_]),
        )
        store(self.y, place, result)
