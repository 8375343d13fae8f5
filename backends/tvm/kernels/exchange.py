"""Borders of planes, filled from the neighbouring tiles."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    number,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.planes import Planes, Run, runs_of


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
        for down in runs_of(planes.tile[0], planes.border, planes.grid[0], planes.size[0]):
            for across in runs_of(planes.tile[1], planes.border, planes.grid[1], planes.size[1]):
                if down.shift or across.shift or not all(down.inside) or not all(across.inside):
                    self._rectangle(y, item, down, across)

    def _rectangle(self, y: Buffer, item: Expr, down: Run, across: Run) -> None:
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

    def _lanes(self, down: Run, across: Run) -> Iterator[int]:
        """For each lane the lane it is filled from, 16 for zero."""
        for row in range(self.planes.grid[0]):
            for column in range(self.planes.grid[1]):
                inside = down.inside[row] and across.inside[column]
                source = (row + down.shift) * self.planes.grid[1] + column + across.shift
                yield source if inside else LANES
