"""Where the windows of a convolution lie, and which of their taps are inside the image."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import Expr

Tile = Callable[[Expr, int, int | None], None]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a 2-d convolution.

    Attributes:
        size: input height and width.
        kernel: height and width of a filter.
        stride: vertical and horizontal.
        padding: (top, bottom, left, right), zeros.
        dilation: vertical and horizontal.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def output_size(self) -> tuple[int, int]:
        """Output height and width."""
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return (
            (self.size[0] + top + bottom - reach[0]) // self.stride[0] + 1,
            (self.size[1] + left + right - reach[1]) // self.stride[1] + 1,
        )

    def row(self, output_row: Expr, tap: Expr) -> Expr:
        """Input row that a tap reads; may be outside of the image."""
        return output_row * self.stride[0] - self.padding[0] + tap * self.dilation[0]

    def column(self, pixel: Expr, tap: Expr) -> Expr:
        """Input column that a tap reads; may be outside of the image."""
        return pixel * self.stride[1] - self.padding[2] + tap * self.dilation[1]

    def tap_rows(self, output_row: Expr) -> tuple[Expr, Expr]:
        """First tap row inside the image, and one past the last."""
        if self.padding[0] <= 0 and self.padding[1] <= 0:
            return 0, self.kernel[0]
        step, top = self.dilation[0], self.row(output_row, 0)
        low = T.max(0, T.floordiv(step - 1 - top, step))
        high = T.min(self.kernel[0], T.floordiv(self.size[0] - 1 - top, step) + 1)
        return low, high

    def has_column(self, pixel: int, tap: int) -> bool:
        """Whether a tap of a known output pixel is inside the image."""
        return bool(0 <= self.column(pixel, tap) < self.size[1])

    def for_each_tile(self, width: int, emit: Tile) -> None:
        """Emit the tiles of an output row as ``emit(start, width, position)``.

        Tiles whose every tap is inside the image run in one loop, where `position` is None. Each
        of the others is emitted by itself with `position` equal to `start`, so that taps outside
        are left out when the code is made.
        """
        out_width, last_tap = self.output_size[1], self.kernel[1] - 1
        starts = range(0, out_width, width)
        interior = [
            start
            for start in starts
            if start + width <= out_width
            and self.has_column(start, 0)
            and self.has_column(start + width - 1, last_tap)
        ]
        for start in starts:
            if start not in interior:
                emit(start, min(width, out_width - start), start)
        if interior:
            with T.serial(0, len(interior)) as index:
                emit(interior[0] + index * width, width, None)
