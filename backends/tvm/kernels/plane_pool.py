"""Pooling of planes where windows lie inside of tiles."""

import math
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    local,
    number,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.planes import Planes, cut
from shohin.backends.tvm.kernels.pool import Mode, combined


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

    mode: Mode
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
                store(total, [ramp(0)], combined(self.mode, total[ramp(0)], value))
            result = total[ramp(0)]
            if self.mode == "average":
                result = result * number(1.0 / len(taps))
            store(y, [item, self.result.at(row, column), ramp(0)], result)


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
