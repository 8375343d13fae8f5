"""Convolution with few weights: every one of them costs, and nothing else.

Images are planes of vectors (see `planes`), so a weight is a number and a distance: one broadcast,
and one multiply-add from memory for each vector of pixels. The weights are sorted by chunks of
input channels, so that the pixels a tile reads stay in the first level cache while all filters go
over them; sums wait in the output from chunk to chunk. One work item is a tile of pixels and a
group of filters; groups have about equally many weights.

What limits the speed is reading pixels. So filters can also go in pairs: where both have a weight
at the same place, the pixels are read once for the two.
"""

from dataclasses import dataclass, replace

import numpy as np
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
    held,
    local,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.list_layout import PAIR_LISTS, ListLayout
from shohin.backends.tvm.kernels.planes import Planes, cut, register_tiles
from shohin.backends.tvm.kernels.sparse_lists import pack_lists, tap_places

_NEAR_CACHE = 24_000
"""Bytes of pixels that stay in a first level cache of 32 KiB beside weights and sums."""

_PAIR_REGISTERS = 24
"""Registers from which on the sums of two filters have room beside each other."""


@dataclass(frozen=True)
class SparseTile:
    """How a sparse convolution is cut.

    Attributes:
        rows: rows of pixels whose sums are in registers together.
        columns: columns of them.
        channels: input channels of a chunk.
        filters: output channels whose sums are in registers together, 1 or 2.
    """

    rows: int
    columns: int
    channels: int
    filters: int = 1


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
    def units(self) -> int:
        """Filters, or pairs of them."""
        return self.filters // self.tile.filters

    @property
    def lists(self) -> int:
        """Lists of a unit: of both filters of a pair, of the first alone, of the second alone."""
        return PAIR_LISTS if self.tile.filters == 2 else 1

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
        if self.filters % 2 == 0 and registers >= _PAIR_REGISTERS:
            pairs = register_tiles(self.source.tile, (registers - 2) // 2)
            options += [SparseTile(*shape, size, 2) for shape in pairs for size in chunks]
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
        per_weight = max(vectors * missing * spread * self._reads(tile), 4.0) + 1.5
        passes = self.filters * ceil_div(self.channels, tile.channels)
        return tiles * (self.nonzeros * per_weight + passes * (3.0 * vectors + 25.0))

    def _reads(self, tile: SparseTile) -> float:
        """Reads of pixels for each weight, if weights lie at random."""
        down, across = self.geometry.kernel
        density = self.nonzeros / (self.filters * self.channels * down * across)
        return 1.0 if tile.filters == 1 else max(0.8, 1.0 - density / 2)

    def tile_text(self) -> str:
        """Rows, columns, channels of a chunk, and whether filters go in pairs."""
        pairs = "" if self.tile.filters == 1 else "/pairs"
        return f"{self.tile.rows}x{self.tile.columns}/{self.tile.channels}c{pairs}"

    def parameters(self) -> tuple[Parameter, ...]:
        """Planes, values, distances, starts of lists, groups, bias, step operands, planes."""
        result = self.result.shape(self.batch, self.filters)
        return (
            Parameter("x", self.source.shape(self.batch, self.channels)),
            Parameter("value", (max(1, self.nonzeros),)),
            Parameter("distance", (max(1, self.nonzeros),), "uint16" if self.narrow else "int32"),
            Parameter("start", (self.chunks * self.units * self.lists + 1,), "int32"),
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
        return self.pack(weight.reshape(self.filters, self.channels, rows, columns))

    @property
    def layout(self) -> ListLayout:
        """How distances follow from places."""
        taps = tap_places(self.geometry, self.source)
        stride = self.source.phases * self.source.plane
        channels = min(self.channels, self.tile.channels)
        return ListLayout(tuple(taps.tolist()), stride, channels, paired=self.tile.filters == 2)

    def pack(self, weight: Array) -> dict[str, Array]:
        """Weights ``[O, C, KH, KW]`` as lists, by the names of parameters."""
        return pack_lists(weight, self.layout, self.groups, self.narrow)


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
            self._unit(chunk, low + index, row, column)

    def _unit(self, chunk: Expr, unit: Expr, row: Expr, column: Expr) -> None:
        """A filter or a pair of filters, over the channels of a chunk."""
        conv = self.conv
        pixels = [(r, c) for r in range(conv.tile.rows) for c in range(conv.tile.columns)]
        every = [
            (unit * conv.tile.filters + number, pixel)
            for number in range(conv.tile.filters)
            for pixel in pixels
        ]
        sums = local(len(every) * LANES)

        def place(filter_: Expr, pixel: tuple[int, int]) -> list[Expr]:
            vector = conv.result.at(row + pixel[0], column + pixel[1])
            return [self.image, filter_, vector, ramp(0)]

        def begin() -> None:
            for number, (filter_, _) in enumerate(every):
                store(sums, [ramp(number * LANES)], splat(self.bias[filter_]))

        def go_on() -> None:
            for number, which in enumerate(every):
                store(sums, [ramp(number * LANES)], self.y[tuple(place(*which))])

        def wait() -> None:
            for number, which in enumerate(every):
                store(self.y, place(*which), sums[ramp(number * LANES)])

        def finish() -> None:
            for number, (filter_, pixel) in enumerate(every):
                self._finish(sums[ramp(number * LANES)], filter_, place(filter_, pixel))

        one = conv.chunks == 1
        either(one or chunk == 0, begin, go_on)
        self._accumulate(sums, chunk, unit, row * conv.source.framed[1] + column)
        either(one or chunk == conv.chunks - 1, finish, wait)

    def _accumulate(self, sums: Buffer, chunk: Expr, unit: Expr, first: Expr) -> None:
        conv = self.conv
        listed = (chunk * conv.units + unit) * conv.lists
        chunk_plane = chunk * conv.tile.channels * conv.source.phases
        if conv.tile.filters == 1:
            self._go_over(sums, listed, (0,), chunk_plane, first)
            return
        self._go_over(sums, listed, (0, 1), chunk_plane, first)
        self._go_over(sums, listed + 1, (0,), chunk_plane, first)
        self._go_over(sums, listed + 2, (1,), chunk_plane, first)

    def _go_over(
        self, sums: Buffer, listed: Expr, members: tuple[int, ...], chunk_plane: Expr, first: Expr
    ) -> None:
        """Add what the weights of a list give to the sums of some filters of the unit.

        Weights of several filters follow each other, and have the same place.
        """
        conv, step = self.conv, len(members)
        pixels = conv.tile.rows * conv.tile.columns
        low = self.start[listed]
        with T.serial(0, T.floordiv(self.start[listed + 1] - low, step)) as index:
            entry = low + index * step
            at = local(1, "int32")
            store(at, [0], first + T.cast(self.distance[entry], "int32"))
            values = [held(splat(self.value[entry + i]), LANES) for i in range(step)]
            for number in range(pixels):
                row, column = divmod(number, conv.tile.columns)
                vector = at[0] + row * conv.source.framed[1] + column
                x = self.x[self.image, chunk_plane, vector, ramp(0)]
                x = x if step == 1 else held(x, LANES)
                for member, value in zip(members, values, strict=True):
                    lane = ramp((member * pixels + number) * LANES)
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
