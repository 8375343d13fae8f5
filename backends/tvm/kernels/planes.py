"""Images as planes of vectors: what kernels that run along pixels read.

A plane is one channel. The image is cut in a grid of sixteen tiles, and a vector holds the same
pixel of every tile: ``[rows, columns, 16]``. So the neighbour of a pixel is another whole vector,
on its natural boundary, whatever the direction. Every tile has a border: a frame of the pixels of
its neighbours, zero where the image ends. A strided convolution reads every ``stride``-th pixel;
its planes are split in phases, each with the pixels that one tap reads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    ceil_div,
    local,
    number,
    ramp,
    store,
)

Source = Literal["plain", "blocked"]

_GRIDS = ((4, 4), (2, 8), (8, 2), (1, 16), (16, 1))

_INEXACT = 1.04
"""Images that tiles do not cover exactly cannot be pooled in planes."""

_TOGETHER = 14
"""Pixels whose sums the registers of a large processor hold."""


@dataclass(frozen=True)
class Planes:
    """Where the pixels of an image lie.

    Attributes:
        size: height and width of the image.
        grid: tiles down and across, sixteen together.
        border: width of the frame around every tile.
        stride: vertical and horizontal step of what reads it; the image is split in as many
            phases, all cut in the same way.
        tile: rows and columns of a tile, of a phase.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    border: int
    tile: tuple[int, int]
    stride: tuple[int, int] = (1, 1)

    @property
    def phases(self) -> int:
        """Number of phases."""
        return self.stride[0] * self.stride[1]

    @property
    def phase_size(self) -> tuple[int, int]:
        """Rows and columns of the largest phase."""
        return (ceil_div(self.size[0], self.stride[0]), ceil_div(self.size[1], self.stride[1]))

    @property
    def framed(self) -> tuple[int, int]:
        """Rows and columns of a tile with its border."""
        return (self.tile[0] + 2 * self.border, self.tile[1] + 2 * self.border)

    @property
    def plane(self) -> int:
        """Vectors of one phase of one channel."""
        return self.framed[0] * self.framed[1]

    def shape(self, batch: int, channels: int) -> tuple[int, ...]:
        """Of the array that holds images, in vectors."""
        return (batch, channels * self.phases, self.plane, LANES)

    def at(self, row: Expr, column: Expr) -> Expr:
        """The vector of a pixel of the tiles; the border is beyond the tile's own pixels."""
        return (row + self.border) * self.framed[1] + column + self.border

    def serves(self, other: "Planes") -> bool:
        """Whether whatever reads the others can read these: only a wider border may differ."""
        alike = (self.size, self.grid, self.tile, self.stride)
        return self.border >= other.border and alike == (
            other.size,
            other.grid,
            other.tile,
            other.stride,
        )


def cut(size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """A grid and a tile that waste few pixels of an image and divide well among registers.

    Args:
        size: height and width.
    """
    options = [
        (grid, (rows, columns))
        for grid in _GRIDS
        for rows in _slightly_more(ceil_div(size[0], grid[0]))
        for columns in _slightly_more(ceil_div(size[1], grid[1]))
    ]

    def cost(option: tuple[tuple[int, int], tuple[int, int]]) -> float:
        grid, tile = option
        exact = all(g * t == s for g, t, s in zip(grid, tile, size, strict=True))
        return _cost(tile) * (1.0 if exact else _INEXACT)

    return min(options, key=cost)


def _slightly_more(number: int) -> range:
    return range(number, number + 1 + number // 8)


def _cost(tile: tuple[int, int]) -> float:
    """Cycles for all pixels: the more are in registers together, the less each weight costs.

    Borders cost a little too: what has long borders is read from further away.
    """
    shapes = register_tiles(tile, _TOGETHER)
    together = max(rows * columns / (1 + 0.02 * (rows - 1)) for rows, columns in shapes)
    return tile[0] * tile[1] * (1 + 1.5 / together) + 0.5 * (tile[0] + tile[1])


def register_tiles(tile: tuple[int, int], most: int) -> set[tuple[int, int]]:
    """Rows and columns of pixels that divide a tile without a rest.

    Args:
        tile: rows and columns of the tile.
        most: pixels that registers hold the sums of.
    """
    return {
        (rows, columns)
        for rows in _divisors(tile[0])
        for columns in _divisors(tile[1])
        if rows * columns <= most
    }


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class _Run:
    """Neighbouring rows or columns of framed tiles whose pixels come from the same place.

    Attributes:
        start: the first, counted from the tile's own first, so -border at the least.
        length: how many.
        shift: how many tiles further the pixels belong.
        inside: for each tile of the axis whether the pixels are in the image.
    """

    start: int
    length: int
    shift: int
    inside: tuple[bool, ...]


def _runs(tile: int, border: int, count: int, size: int) -> list[_Run]:
    runs: list[_Run] = []
    for place in range(-border, tile + border):
        shift = place // tile
        inside = tuple(0 <= index * tile + place < size for index in range(count))
        last = runs[-1] if runs else None
        if last and (last.shift, last.inside) == (shift, inside):
            runs[-1] = _Run(last.start, last.length + 1, shift, inside)
        else:
            runs.append(_Run(place, 1, shift, inside))
    return runs


@dataclass(frozen=True)
class Exchange(Kernel):
    """Fills the borders of planes from the neighbouring tiles, in place.

    Pixels that the grid has beyond the image become zero. One work item is one plane.

    Attributes:
        batch: images.
        channels: channels.
        planes: where they are, in one phase.
    """

    batch: int
    channels: int
    planes: Planes

    @property
    def family(self) -> str:
        """``exchange``."""
        return "exchange"

    @property
    def extent(self) -> int:
        """Images times channels."""
        return self.batch * self.channels

    @property
    def operations(self) -> int:
        """Vectors written, counted as a few operations each."""
        own = math.prod(self.planes.tile)
        return self.extent * (self.planes.plane - own) * 4

    def parameters(self) -> tuple[Parameter, ...]:
        """The planes."""
        return (Parameter("y", (self.extent, self.planes.plane, LANES)),)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One plane, a rectangle of equally shifted pixels at a time."""
        (y,) = buffers
        planes = self.planes
        for down in _runs(planes.tile[0], planes.border, planes.grid[0], planes.size[0]):
            for across in _runs(planes.tile[1], planes.border, planes.grid[1], planes.size[1]):
                if down.shift or across.shift or not all(down.inside) or not all(across.inside):
                    self._rectangle(y, item, down, across)

    def _rectangle(self, y: Buffer, item: Expr, down: _Run, across: _Run) -> None:
        planes = self.planes
        lanes = list(self._lanes(down, across))
        with T.serial(0, down.length) as row, T.serial(0, across.length) as column:
            target = planes.at(down.start + row, across.start + column)
            if all(lane == LANES for lane in lanes):
                store(y, [item, target, ramp(0)], number(0.0))
                return
            source = planes.at(
                down.start + row - down.shift * planes.tile[0],
                across.start + column - across.shift * planes.tile[1],
            )
            vectors = [y[item, source, ramp(0)], number(0.0)]
            store(y, [item, target, ramp(0)], tirx.Shuffle(vectors, lanes))

    def _lanes(self, down: _Run, across: _Run) -> Iterator[int]:
        """For each lane the lane it is filled from, 16 for zero."""
        for row in range(self.planes.grid[0]):
            for column in range(self.planes.grid[1]):
                inside = down.inside[row] and across.inside[column]
                source = (row + down.shift) * self.planes.grid[1] + column + across.shift
                yield source if inside else LANES


@dataclass(frozen=True)
class PlanePool(Kernel):
    """Maximum or average over windows side by side, inside of every tile. One item is one plane.

    Attributes:
        mode: maximum or average.
        batch: images.
        channels: channels.
        source: where the input's pixels are, in one phase; its tiles are whole windows.
        window: rows and columns of a window, which are also its steps.
        border: width of the frame left around the result's tiles.
    """

    mode: Literal["max", "average"]
    batch: int
    channels: int
    source: Planes
    window: tuple[int, int]
    border: int

    @property
    def family(self) -> str:
        """``plane_pool``."""
        return "plane_pool"

    @property
    def result(self) -> Planes:
        """Where the output's pixels are: in tiles of the same grid."""
        size = (self.source.size[0] // self.window[0], self.source.size[1] // self.window[1])
        rows, columns = self.source.tile
        tile = (rows // self.window[0], columns // self.window[1])
        return Planes(size, self.source.grid, self.border, tile)

    @property
    def extent(self) -> int:
        """Images times channels."""
        return self.batch * self.channels

    @property
    def operations(self) -> int:
        """Vectors read, counted as four operations each."""
        return self.extent * math.prod(self.source.tile) * 4

    def parameters(self) -> tuple[Parameter, ...]:
        """Planes, planes."""
        return (
            Parameter("x", (self.extent, self.source.plane, LANES)),
            Parameter("y", (self.extent, self.result.plane, LANES)),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One plane, without its border."""
        x, y = buffers
        rows, columns = self.result.tile
        down, across = self.window
        with T.serial(0, rows) as row, T.serial(0, columns) as column:
            taps = [(r, c) for r in range(down) for c in range(across)]
            places = [self.source.at(row * down + r, column * across + c) for r, c in taps]
            total = local(LANES)
            store(total, [ramp(0)], x[item, places[0], ramp(0)])
            for place in places[1:]:
                value = x[item, place, ramp(0)]
                store(total, [ramp(0)], self._combine(total[ramp(0)], value))
            result = total[ramp(0)]
            if self.mode == "average":
                result = result * number(1.0 / len(taps))
            store(y, [item, self.result.at(row, column), ramp(0)], result)

    def _combine(self, held: Expr, value: Expr) -> Expr:
        if self.mode == "average":
            return held + value
        # NaN is the largest of all, as in PyTorch, whichever side it is on.
        return T.call_llvm_pure_intrin(f"float32x{LANES}", "llvm.maximum", held, value)


def pools_in_planes(source: Planes, window: tuple[int, int]) -> bool:
    """Whether windows side by side divide an image and its tiles without a rest.

    The result must be cut as an image of its size is, so that others can read it.
    """
    whole = all(
        size % step == 0 and tile % step == 0 and size == tile * count
        for size, tile, step, count in zip(
            source.size, source.tile, window, source.grid, strict=True
        )
    )
    if not whole or source.phases > 1:
        return False
    size = (source.size[0] // window[0], source.size[1] // window[1])
    tile = (source.tile[0] // window[0], source.tile[1] // window[1])
    return cut(size) == (source.grid, tile)


@dataclass(frozen=True)
class _Layout(Kernel):
    """Common form of both directions.

    Attributes:
        batch: images.
        channels: channels.
        planes: where they are as planes.
        other: their other layout.
    """

    batch: int
    channels: int
    planes: Planes
    other: Source

    @property
    def groups(self) -> int:
        """Channels, or blocks of them."""
        return self.channels if self.other == "plain" else blocks(self.channels)

    @property
    def extent(self) -> int:
        """Images times groups times rows of the image."""
        return self.batch * self.groups

    @property
    def operations(self) -> int:
        """Elements moved, scattered ones counted as two."""
        return self.batch * self.channels * math.prod(self.planes.size) * 2

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of the other layout."""
        if self.other == "blocked":
            return (self.batch, blocks(self.channels), *self.planes.size, LANES)
        return (self.batch, self.channels, *self.planes.size)

    def place(self, item: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """Image, group, first channel and number of channels of a work item."""
        image, group = T.floordiv(item, self.groups), T.floormod(item, self.groups)
        if self.other == "plain":
            return image, group, group, 1
        ragged = self.channels % LANES
        count = T.min(LANES, self.channels - group * LANES) if ragged else LANES
        return image, group, group * LANES, count


@dataclass(frozen=True)
class ToPlanes(_Layout):
    """Plain or blocked images to planes with their borders. One item is one group of channels."""

    @property
    def family(self) -> str:
        """``to_planes``."""
        return "to_planes"

    def parameters(self) -> tuple[Parameter, ...]:
        """Images, planes."""
        return (
            Parameter("x", self.image),
            Parameter("y", self.planes.shape(self.batch, self.channels)),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Every phase of the group, a rectangle of pixels that are in the same tiles at a time."""
        planes = self.planes
        for phase in range(planes.phases):
            offset = divmod(phase, planes.stride[1])
            for down in self._axis(0, offset[0]):
                for across in self._axis(1, offset[1]):
                    with T.serial(0, down.length) as row, T.serial(0, across.length) as column:
                        place = (down.start + row, across.start + column)
                        self._pixel(item, buffers, phase, place, (down.inside, across.inside))

    def _axis(self, axis: int, offset: int) -> list[_Run]:
        planes = self.planes
        size = ceil_div(planes.size[axis] - offset, planes.stride[axis])
        return _runs(planes.tile[axis], planes.border, planes.grid[axis], size)

    def _pixel(
        self,
        item: Expr,
        buffers: tuple[Buffer, ...],
        phase: int,
        place: tuple[Expr, Expr],
        inside: tuple[tuple[bool, ...], tuple[bool, ...]],
    ) -> None:
        """One pixel of every tile; zero in those where it is outside of the image."""
        x, y = buffers
        planes = self.planes
        image, group, first, count = self.place(item)
        vector = planes.at(*place)
        offset = divmod(phase, planes.stride[1])
        lanes: list[list[Expr] | None] = []
        for lane in range(LANES):
            tile = divmod(lane, planes.grid[1])
            pixel = [
                (tile[axis] * planes.tile[axis] + place[axis]) * planes.stride[axis] + offset[axis]
                for axis in (0, 1)
            ]
            used = inside[0][tile[0]] and inside[1][tile[1]]
            lanes.append([image, group, *pixel] if used else None)
        if self.other == "plain":
            for lane, index in enumerate(lanes):
                value = T.float32(0.0) if index is None else x[tuple(index)]
                store(y, [image, first * planes.phases + phase, vector, lane], value)
            return
        vectors = [number(0.0) if i is None else x[(*i, ramp(0))] for i in lanes]
        for channel, result in enumerate(transposed(vectors)):
            target = [image, (first + channel) * planes.phases + phase, vector, ramp(0)]
            _store_if(count, channel, y, target, result)


@dataclass(frozen=True)
class FromPlanes(_Layout):
    """Planes of one phase to plain or blocked images. One item is one group of channels."""

    @property
    def family(self) -> str:
        """``from_planes``."""
        return "from_planes"

    def parameters(self) -> tuple[Parameter, ...]:
        """Planes, images."""
        return (
            Parameter("x", self.planes.shape(self.batch, self.channels)),
            Parameter("y", self.image),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Every tile's own pixels that are in the image."""
        planes = self.planes
        for down in _runs(planes.tile[0], 0, planes.grid[0], planes.size[0]):
            for across in _runs(planes.tile[1], 0, planes.grid[1], planes.size[1]):
                with T.serial(0, down.length) as row, T.serial(0, across.length) as column:
                    place = (down.start + row, across.start + column)
                    self._pixel(item, buffers, place, (down.inside, across.inside))

    def _pixel(
        self,
        item: Expr,
        buffers: tuple[Buffer, ...],
        place: tuple[Expr, Expr],
        inside: tuple[tuple[bool, ...], tuple[bool, ...]],
    ) -> None:
        x, y = buffers
        planes = self.planes
        image, group, first, count = self.place(item)
        vector = planes.at(*place)
        results: list[Expr] = []
        if self.other == "blocked":
            channels = [
                self._channel(x, [image, first + c, vector], count, c) for c in range(LANES)
            ]
            results = transposed(channels)
        for lane in range(LANES):
            tile = divmod(lane, planes.grid[1])
            if not (inside[0][tile[0]] and inside[1][tile[1]]):
                continue
            pixel = [tile[axis] * planes.tile[axis] + place[axis] for axis in (0, 1)]
            if results:
                store(y, [image, group, *pixel, ramp(0)], results[lane])
            else:
                store(y, [image, group, *pixel], x[image, first, vector, lane])

    def _channel(self, x: Buffer, index: list[Expr], count: Expr, channel: int) -> Expr:
        """A channel's vector; zero for those that fill up the last block."""
        held = local(LANES)
        store(held, [ramp(0)], number(0.0))
        _store_if(count, channel, held, [ramp(0)], x[(*index, ramp(0))])
        return held[ramp(0)]


def _store_if(count: Expr, channel: int, buffer: Buffer, place: list[Expr], value: Expr) -> None:
    """Store what is of a channel that exists."""
    if isinstance(count, int):
        store(buffer, place, value)
        return
    with T.If(channel < count), T.Then():
        store(buffer, place, value)


def transposed(vectors: list[Expr]) -> list[Expr]:
    """Sixteen vectors as the columns of what they are the rows of: four stages of exchanges."""
    held = [_held(vector) for vector in vectors]
    for step in (8, 4, 2, 1):
        for first in (index for index in range(LANES) if not index & step):
            pair = [held[first], held[first + step]]
            low = [lane if not lane & step else lane - step + LANES for lane in range(LANES)]
            high = [lane + step if not lane & step else lane + LANES for lane in range(LANES)]
            held[first] = _held(tirx.Shuffle(pair, low))
            held[first + step] = _held(tirx.Shuffle(pair, high))
    return held


def _held(value: Expr) -> Expr:
    """The value from a register: TVM unfolds an expression that is used more than once."""
    register = local(LANES)
    store(register, [ramp(0)], value)
    return register[ramp(0)]
