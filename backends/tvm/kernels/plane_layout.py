"""Conversions between planes and the other layouts of images."""

import math
from dataclasses import dataclass
from typing import Literal

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
from shohin.backends.tvm.kernels.planes import Planes, Run, runs_of
from shohin.backends.tvm.kernels.transposition import transposed

Source = Literal["plain", "blocked"]


@dataclass(frozen=True)
class _Conversion(Kernel):
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
        """Images times groups of channels."""
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
class ToPlanes(_Conversion):
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

    def _axis(self, axis: int, offset: int) -> list[Run]:
        planes = self.planes
        size = ceil_div(planes.size[axis] - offset, planes.stride[axis])
        return runs_of(planes.tile[axis], planes.border, planes.grid[axis], size)

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
class FromPlanes(_Conversion):
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
        for down in runs_of(planes.tile[0], 0, planes.grid[0], planes.size[0]):
            for across in runs_of(planes.tile[1], 0, planes.grid[1], planes.size[1]):
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
