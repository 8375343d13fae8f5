"""Images as planes with zeros around: what kernels that run along pixels read.

A plane is one channel. Its rows are `pitch` floats apart, wider than the image, and the columns
between rows are zero: they are what is left of one row and right of the one before. So the pixels
of an image are one run of memory, and a window's tap is a constant distance in it, at the borders
too. A strided convolution reads every ``stride``-th pixel; its planes are split in phases, each
with the pixels that one tap reads.
"""

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
    number,
    ramp,
    store,
)

SLACK = 256
"""Floats behind the last plane that a vector may read and never use."""

Source = Literal["plain", "blocked"]


@dataclass(frozen=True)
class Planes:
    """Where the pixels of an image lie.

    Attributes:
        size: height and width of the image.
        border: rows of zeros above and below.
        pitch: floats from one row to the next.
        stride: vertical and horizontal step of what reads it; the image is split in as many
            phases.
    """

    size: tuple[int, int]
    border: int
    pitch: int
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
    def plane(self) -> int:
        """Floats of one phase of one channel."""
        return (self.phase_size[0] + 2 * self.border) * self.pitch

    @property
    def first(self) -> int:
        """The first pixel's place in its plane."""
        return self.border * self.pitch

    def shape(self, batch: int, channels: int) -> tuple[int, ...]:
        """Of the array that holds images."""
        return (batch * channels * self.phases * self.plane + SLACK,)

    def holds(self, other: "Planes") -> bool:
        """Whether these planes serve whatever the others do."""
        same = (self.size, self.stride) == (other.size, other.stride)
        gap, other_gap = (p.pitch - p.phase_size[1] for p in (self, other))
        return same and self.border >= other.border and gap >= other_gap


@dataclass(frozen=True)
class ToPlanes(Kernel):
    """Plain or blocked images to planes. One work item is one channel, or one block of them.

    Attributes:
        batch: images.
        channels: channels.
        planes: where they go.
        source: layout of the input.
    """

    batch: int
    channels: int
    planes: Planes
    source: Source

    @property
    def family(self) -> str:
        """``to_planes``."""
        return "to_planes"

    @property
    def _groups(self) -> int:
        return self.channels if self.source == "plain" else blocks(self.channels)

    @property
    def extent(self) -> int:
        """Images times channels, or times blocks of channels."""
        return self.batch * self._groups

    @property
    def operations(self) -> int:
        """Elements moved, scattered ones counted as two."""
        return self.batch * self.channels * self.planes.size[0] * self.planes.size[1] * 2

    def parameters(self) -> tuple[Parameter, ...]:
        """Images, planes."""
        height, width = self.planes.size
        shape: tuple[int, ...] = (self.batch, self.channels, height, width)
        if self.source == "blocked":
            shape = (self.batch, blocks(self.channels), height, width, LANES)
        return Parameter("x", shape), Parameter("y", self.planes.shape(self.batch, self.channels))

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Zeros, then the pixels over them."""
        x, y = buffers
        image = T.floordiv(item, self._groups)
        group = T.floormod(item, self._groups)
        lanes: Expr = 1
        first = group
        if self.source == "blocked":
            lanes = T.min(LANES, self.channels - group * LANES)
            first = group * LANES
        length = self.planes.phases * self.planes.plane
        start = (image * self.channels + first) * length
        fill(y, start, lanes * length)
        with T.serial(0, self.planes.size[0]) as row:
            self._row(x, y, (image, group, row), (start, lanes))

    def _row(
        self,
        x: Buffer,
        y: Buffer,
        place: tuple[Expr, Expr, Expr],
        target: tuple[Expr, Expr],
    ) -> None:
        planes = self.planes
        image, group, row = place
        start, lanes = target
        down, right = planes.stride
        phase_row = T.floormod(row, down) * right
        base = start + planes.first + T.floordiv(row, down) * planes.pitch
        length = planes.phases * planes.plane
        for phase in range(right):
            columns = ceil_div(planes.size[1] - phase, right)
            at = base + (phase_row + phase) * planes.plane
            if self.source == "blocked":
                with T.serial(0, lanes) as lane, T.serial(0, columns) as column:
                    value = x[image, group, row, column * right + phase, lane]
                    store(y, [at + lane * length + column], value)
                continue
            whole = columns // LANES * LANES if right == 1 else 0
            with T.serial(0, whole // LANES) as index:
                value = x[image, group, row, ramp(index * LANES)]
                store(y, [ramp(at + index * LANES)], value)
            with T.serial(whole, columns) as column:
                store(y, [at + column], x[image, group, row, column * right + phase])


@dataclass(frozen=True)
class FromPlanes(Kernel):
    """Planes to plain or blocked images. One work item is one channel, or one block of them.

    Attributes:
        batch: images.
        channels: channels.
        planes: where they are, in one phase.
        target: layout of the result.
    """

    batch: int
    channels: int
    planes: Planes
    target: Source

    @property
    def family(self) -> str:
        """``from_planes``."""
        return "from_planes"

    @property
    def _groups(self) -> int:
        return self.channels if self.target == "plain" else blocks(self.channels)

    @property
    def extent(self) -> int:
        """Images times channels, or times blocks of channels."""
        return self.batch * self._groups

    @property
    def operations(self) -> int:
        """Elements moved, scattered ones counted as two."""
        return self.batch * self.channels * self.planes.size[0] * self.planes.size[1] * 2

    def parameters(self) -> tuple[Parameter, ...]:
        """Planes, images."""
        height, width = self.planes.size
        shape: tuple[int, ...] = (self.batch, self.channels, height, width)
        if self.target == "blocked":
            shape = (self.batch, blocks(self.channels), height, width, LANES)
        return Parameter("x", self.planes.shape(self.batch, self.channels)), Parameter("y", shape)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One channel or block of channels, a row at a time."""
        x, y = buffers
        planes = self.planes
        image, group = T.floordiv(item, self._groups), T.floormod(item, self._groups)
        channel = group if self.target == "plain" else group * LANES
        start = (image * self.channels + channel) * planes.plane + planes.first
        with T.serial(0, planes.size[0]) as row:
            at = start + row * planes.pitch
            if self.target == "blocked":
                self._blocked_row(x, y, (image, group, row), at)
            else:
                self._plain_row(x, y, (image, group, row), at)

    def _plain_row(self, x: Buffer, y: Buffer, place: tuple[Expr, Expr, Expr], start: Expr) -> None:
        width = self.planes.size[1]
        whole = width // LANES * LANES
        with T.serial(0, whole // LANES) as index:
            store(y, [*place, ramp(index * LANES)], x[ramp(start + index * LANES)])
        with T.serial(whole, width) as column:
            store(y, [*place, column], x[start + column])

    def _blocked_row(
        self, x: Buffer, y: Buffer, place: tuple[Expr, Expr, Expr], start: Expr
    ) -> None:
        image, group, row = place
        ragged = self.channels % LANES
        lanes = T.min(LANES, self.channels - group * LANES) if ragged else LANES
        with T.serial(0, self.planes.size[1]) as column:
            if ragged:
                store(y, [image, group, row, column, ramp(0)], number(0.0))
            with T.serial(0, lanes) as lane:
                value = x[start + lane * self.planes.plane + column]
                store(y, [image, group, row, column, lane], value)


def fill(buffer: Buffer, start: Expr, length: Expr) -> None:
    """Zeros from a place on."""
    whole = T.floordiv(length, LANES)
    with T.serial(0, whole) as index:
        store(buffer, [ramp(start + index * LANES)], number(0.0))
    with T.serial(0, length - whole * LANES) as index:
        store(buffer, [start + whole * LANES + index], T.float32(0.0))
