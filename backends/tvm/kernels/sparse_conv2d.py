"""Convolution with few weights: every one of them costs, and nothing else.

Images are planes (see `planes`), so the pixels of a tile are a few vectors in a row whatever the
tap, and a weight is a number and a distance: one broadcast and one multiply-add a vector. The
weights are sorted by chunks of input channels, so that the pixels a tile reads stay in the first
level cache while all filters go over them; sums wait in the output from chunk to chunk. One work
item is a tile of pixels and a group of filters; groups have about equally many weights.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

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
from shohin.backends.tvm.kernels.partial import store_lanes
from shohin.backends.tvm.kernels.planes import Planes, fill

Emit = Callable[[], None]


@dataclass(frozen=True)
class SparseTile:
    """How a sparse convolution is cut.

    Attributes:
        vectors: most vectors of pixels whose sums are in registers together.
        channels: input channels of a chunk.
    """

    vectors: int
    channels: int


@dataclass(frozen=True)
class SparseConv2d(Kernel):
    """A convolution whose weights are lists, with fused bias and element-wise steps.

    Attributes:
        batch: images.
        channels: input channels.
        filters: output channels.
        geometry: sizes, stride, padding, dilation.
        source: where the input's pixels are.
        border: rows of zeros around the result; 0 where nothing needs zeros around it.
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
        """Where the output's pixels are: as far apart as the input's."""
        return Planes(self.geometry.output_size, self.border, self.source.pitch)

    @property
    def chunks(self) -> int:
        """Chunks of input channels."""
        return ceil_div(self.channels, self.tile.channels)

    @property
    def span(self) -> int:
        """Floats from the first to the last pixel of a plane of the result."""
        height, width = self.geometry.output_size
        return (height - 1) * self.source.pitch + width

    @property
    def tiles(self) -> int:
        """Tiles of a plane; they differ by one vector at most."""
        return ceil_div(ceil_div(self.span, LANES), self.tile.vectors)

    @property
    def extent(self) -> int:
        """Images times groups of filters times tiles."""
        return self.batch * self.groups * self.tiles

    @property
    def operations(self) -> int:
        """Multiply-accumulates, and the passes over the sums."""
        passes = self.filters * self.chunks * 2
        return self.batch * self.tiles * self.tile.vectors * LANES * (self.nonzeros + passes)

    @property
    def narrow(self) -> bool:
        """Whether distances inside a chunk fit 16 bits."""
        return self.tile.channels * self.source.phases * self.source.plane <= 1 << 16

    def variants(self, registers: int) -> "tuple[SparseConv2d, ...]":
        """Wider and narrower tiles, larger and smaller chunks."""
        widest = 8 if registers > 16 else max(1, min(4, registers - 2))
        most = ceil_div(self.span, LANES)
        widths = sorted({min(width, most) for width in (widest, widest * 3 // 4, widest // 2)})
        chunks = sorted({min(self.channels, size) for size in (16, 32, 64)})
        options = [SparseTile(w, c) for w in reversed(widths) if w for c in chunks]
        ordered = sorted(options, key=self._cost)
        return tuple(replace(self, tile=tile) for tile in ordered)

    def _cost(self, tile: SparseTile) -> float:
        """Cycles of all tiles, roughly."""
        vectors = ceil_div(self.span, LANES)
        tiles = ceil_div(vectors, tile.vectors)
        floats = tile.channels * self.source.phases * self.geometry.kernel[0]
        window = floats * min(self.source.pitch + tile.vectors * LANES, self.source.plane) * 4
        missing = 1.0 if window <= 24_000 else 1.3
        per_weight = max(tile.vectors * 1.5, 4.0) * missing + 1.0
        passes = self.filters * ceil_div(self.channels, tile.channels)
        return tiles * (self.nonzeros * per_weight + passes * (2.0 * tile.vectors + 6.0))

    def tile_text(self) -> str:
        """Vectors, and channels of a chunk."""
        return f"{self.tile.vectors}v{self.tile.channels}c"

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
        "group": _even_groups(weights_of, kernel.groups),
    }


def _at_least_one(array: Array) -> Array:
    return array if array.size else np.zeros(1, array.dtype)


def _tap_places(geometry: Geometry, planes: Planes) -> NDArray[np.int64]:
    """Distance of each tap's pixel from the first pixel of the channel, borders counted in."""
    places = []
    for tap_row in range(geometry.kernel[0]):
        for tap in range(geometry.kernel[1]):
            row = tap_row * geometry.dilation[0] - geometry.padding[0]
            column = tap * geometry.dilation[1] - geometry.padding[2]
            down, right = geometry.stride
            phase = row % down * right + column % right
            places.append(
                phase * planes.plane
                + (planes.border + row // down) * planes.pitch
                + column // right
            )
    return np.array(places, np.int64)


def needed_planes(geometry: Geometry) -> Planes:
    """The tightest planes that a convolution can read."""
    (height, width), (out_height, out_width) = geometry.size, geometry.output_size
    down, right = geometry.stride
    rows = [t * geometry.dilation[0] - geometry.padding[0] for t in range(geometry.kernel[0])]
    columns = [t * geometry.dilation[1] - geometry.padding[2] for t in range(geometry.kernel[1])]
    phase_rows, phase_columns = ceil_div(height, down), ceil_div(width, right)
    above = max(0, -(rows[0] // down))
    below = max(0, rows[-1] // down + out_height - phase_rows)
    left = max(0, -(columns[0] // right))
    behind = max(0, columns[-1] // right + out_width - phase_columns)
    border = max(above, below, 1 if left or behind else 0)
    pitch = max(phase_columns + max(left, behind), out_width)
    return Planes((height, width), border, pitch, geometry.stride)


def _even_groups(weights: NDArray[np.intp], groups: int) -> Array:
    """First filter of each group and the end, with about equally many weights between."""
    work = np.cumsum(weights + 4)
    bounds = [int(np.searchsorted(work, work[-1] * g / groups)) for g in range(1, groups)]
    return np.array([0, *bounds, weights.size], np.int32)


class _TileEmitter:
    """Emits one work item."""

    def __init__(self, conv: SparseConv2d, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.conv = conv
        self.x, self.value, self.distance, self.start, self.group, self.bias, *rest = buffers
        self.y = rest.pop()
        self.operands = tuple(rest)
        tiles = conv.tiles
        self.tile = T.floormod(item, tiles)
        self.filter_group = T.floormod(T.floordiv(item, tiles), conv.groups)
        self.image = T.floordiv(item, tiles * conv.groups)

    def emit(self) -> None:
        """The first tiles have a vector more; the last is cut where the pixels end."""
        conv = self.conv
        vectors, ragged = ceil_div(conv.span, LANES), conv.span % LANES
        small, large_count = divmod(vectors, conv.tiles)
        whole = conv.tiles - 1 if ragged else conv.tiles
        large = min(large_count, whole)
        if large:
            with T.If(self.tile < large), T.Then():
                self._tile(self.tile * (small + 1) * LANES, small + 1, LANES)
        if whole > large:
            with T.If(T.And(self.tile >= large, self.tile < whole)), T.Then():
                self._tile((self.tile * small + large_count) * LANES, small, LANES)
        if ragged:
            size = small + 1 if large_count == conv.tiles else small
            with T.If(self.tile == conv.tiles - 1), T.Then():
                self._tile((vectors - size) * LANES, size, ragged)

    def _tile(self, first: Expr, size: int, valid: int) -> None:
        """All filters of the group over some pixels.

        Args:
            first: the first pixel's place after that of the plane.
            size: vectors.
            valid: lanes of the last vector that are pixels.
        """
        conv = self.conv
        planes = conv.source
        low, high = self.group[self.filter_group], self.group[self.filter_group + 1]
        channel_size = planes.phases * planes.plane
        image = self.image * (conv.channels * channel_size)
        with T.serial(0, conv.chunks) as chunk:
            pixels = image + chunk * (conv.tile.channels * channel_size) + first
            with T.serial(0, high - low) as index:
                self._filter(chunk, low + index, pixels, first, (size, valid))

    def _filter(
        self, chunk: Expr, filter_: Expr, pixels: Expr, first: Expr, shape: tuple[int, int]
    ) -> None:
        conv = self.conv
        size, _ = shape
        sums = local(size * LANES)
        plane = (self.image * conv.filters + filter_) * conv.result.plane
        place = plane + conv.result.first + first

        def begin() -> None:
            for vector in range(size):
                store(sums, [ramp(vector * LANES)], splat(self.bias[filter_]))

        def go_on() -> None:
            for vector in range(size):
                store(sums, [ramp(vector * LANES)], self.y[ramp(place + vector * LANES)])

        def wait() -> None:
            for vector in range(size):
                self._store(place, vector, shape, sums[ramp(vector * LANES)])

        def finish() -> None:
            self._finish(sums, filter_, place, shape)
            if conv.border or conv.result.pitch > conv.result.size[1]:
                self._clear(plane, first, shape)

        self._either(chunk == 0, begin, go_on)
        listed = chunk * conv.filters + filter_
        self._accumulate(sums, self.start[listed], self.start[listed + 1], pixels, size)
        self._either(chunk == conv.chunks - 1, finish, wait)

    def _accumulate(self, sums: Buffer, low: Expr, high: Expr, pixels: Expr, size: int) -> None:
        with T.serial(0, high - low) as index:
            at = local(1, "int32")
            store(at, [0], pixels + T.cast(self.distance[low + index], "int32"))
            value = splat(self.value[low + index])
            for vector in range(size):
                lane = ramp(vector * LANES)
                store(sums, [lane], sums[lane] + value * self.x[ramp(at[0] + vector * LANES)])

    def _either(self, condition: Expr, then: Emit, otherwise: Emit) -> None:
        if self.conv.chunks == 1:
            then()
            return
        with T.If(condition):
            with T.Then():
                then()
            with T.Else():
                otherwise()

    def _finish(self, sums: Buffer, filter_: Expr, place: Expr, shape: tuple[int, int]) -> None:
        for vector in range(shape[0]):
            result = apply_steps(
                self.conv.steps,
                sums[ramp(vector * LANES)],
                self.operands,
                _reader(place + vector * LANES),
                lambda buffer: splat(buffer[filter_]),
            )
            self._store(place, vector, shape, result)

    def _store(self, place: Expr, vector: int, shape: tuple[int, int], value: Expr) -> None:
        size, valid = shape
        at = place + vector * LANES
        count = valid if vector == size - 1 else LANES
        store_lanes(self.y, lambda last: [last], at, value, count)

    def _clear(self, plane: Expr, first: Expr, shape: tuple[int, int]) -> None:
        """Zeros around the tile's pixels: between its rows, above the first, below the last."""
        result, (size, valid) = self.conv.result, shape
        width, pitch = result.size[1], result.pitch
        end = first + (size - 1) * LANES + valid
        if pitch > width:
            row = T.floordiv(first, pitch)
            rows = T.floordiv(end - 1, pitch) - row + 1
            with T.serial(0, rows) as index, T.serial(width, pitch) as column:
                at = (row + index) * pitch + column
                with T.If(T.And(at >= first, at < end)), T.Then():
                    store(self.y, [plane + result.first + at], T.float32(0.0))
        with T.If(self.tile == 0), T.Then():
            fill(self.y, plane, result.first)
        with T.If(self.tile == self.conv.tiles - 1), T.Then():
            behind = result.plane - result.first - self.conv.span
            fill(self.y, plane + result.first + self.conv.span, behind)


def _reader(place: Expr) -> Callable[[Buffer], Expr]:
    """Lanes behind the last pixel may be anything: they are not stored."""
    return lambda buffer: buffer[ramp(place)]
