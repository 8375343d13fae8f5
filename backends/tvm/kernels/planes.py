"""Images as planes of vectors: what kernels that run along pixels read.

A plane is one channel. The image is cut in a grid of sixteen tiles, and a vector holds the same
pixel of every tile: ``[rows, columns, 16]``. So the neighbour of a pixel is another whole vector,
on its natural boundary, whatever the direction. Every tile has a border: a frame of the pixels of
its neighbours, zero where the image ends. A strided convolution reads every ``stride``-th pixel;
its planes are split in phases, each with the pixels that one tap reads.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

from shohin.backends.tvm.kernels.emit import LANES, Expr, ceil_div

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

    def cut_like(self, other: "Planes") -> bool:
        """Whether nothing but the borders differs."""
        return self == replace(other, border=self.border)

    def serves(self, other: "Planes") -> bool:
        """Whether whatever reads the others can read these: only a wider border may differ."""
        return self.border >= other.border and self.cut_like(other)


@lru_cache(maxsize=256)
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
class Run:
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


def runs_of(tile: int, border: int, count: int, size: int) -> list[Run]:
    """The runs of an axis.

    Args:
        tile: rows or columns of a tile.
        border: width of its frame.
        count: tiles along the axis.
        size: rows or columns of the image.
    """
    runs: list[Run] = []
    for place in range(-border, tile + border):
        shift = place // tile
        inside = tuple(0 <= index * tile + place < size for index in range(count))
        last = runs[-1] if runs else None
        if last and (last.shift, last.inside) == (shift, inside):
            runs[-1] = Run(last.start, last.length + 1, shift, inside)
        else:
            runs.append(Run(place, 1, shift, inside))
    return runs
