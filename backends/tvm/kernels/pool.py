"""Pooling in blocked layout: maximum, average, and the average over a whole image."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    constant,
    local,
    number,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.geometry import Geometry

_PIXELS = 4
"""Neighbouring pixels that are pooled together: enough to hide the latency of a maximum."""

Mode = Literal["max", "average"]


def combined(mode: Mode, held: Expr, value: Expr, dtype: str = "float32") -> Expr:
    """What a window's pixels so far, maximum or sum, become with one more."""
    if mode == "average":
        return held + value
    if dtype != "float32":
        return T.max(held, value)
    # NaN is the largest of all, as in PyTorch, whichever side it is on.
    return T.call_llvm_pure_intrin(f"float32x{LANES}", "llvm.maximum", held, value)


@dataclass(frozen=True)
class Pool2d(Kernel):
    """One work item is one output row of one block of 16 channels.

    Attributes:
        mode: maximum or average.
        batch: images.
        channel_blocks: blocks of 16 channels.
        size: input height and width.
        output_size: output height and width (given, because rounding up depends on it).
        kernel: height and width of a window.
        stride: vertical and horizontal.
        padding: top and left; the other side follows from the sizes.
        dilation: vertical and horizontal, maximum only.
        count_padding: whether an average counts padded zeros.
        divisor: fixed divisor of an average, 0 for none.
        output_blocks: blocks of channels from one output image to the next; 0 for its own.
        dtype: element type; integers have a maximum only.
    """

    mode: Mode
    batch: int
    channel_blocks: int
    size: tuple[int, int]
    output_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    count_padding: bool = True
    divisor: int = 0
    output_blocks: int = 0
    dtype: str = "float32"

    @property
    def family(self) -> str:
        """``max_pool`` or ``average_pool``."""
        return f"{self.mode}_pool"

    @property
    def extent(self) -> int:
        """Images times channel blocks times output rows."""
        return self.batch * self.channel_blocks * self.output_size[0]

    @property
    def operations(self) -> int:
        """Elements read, a vector counted as four."""
        pixels = self.output_size[0] * self.output_size[1] * self.kernel[0] * self.kernel[1]
        return self.batch * self.channel_blocks * pixels * 4

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        stored = self.output_blocks or self.channel_blocks
        return (
            Parameter("x", (self.batch, self.channel_blocks, *self.size, LANES), self.dtype),
            Parameter("y", (self.batch, stored, *self.output_size, LANES), self.dtype),
        )

    @property
    def geometry(self) -> Geometry:
        """The windows; where rounding up adds one, padding behind follows from the sizes."""
        behind = [
            (out - 1) * stride + dilation * (taps - 1) + 1 - size - before
            for out, stride, dilation, taps, size, before in zip(
                self.output_size, self.stride, self.dilation, self.kernel, self.size, self.padding,
                strict=True,
            )
        ]  # fmt: skip
        padding = (self.padding[0], behind[0], self.padding[1], behind[1])
        return Geometry(self.size, self.kernel, self.stride, padding, self.dilation)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row."""
        height = self.output_size[0]
        image = T.floordiv(item, height * self.channel_blocks)
        block = T.floormod(T.floordiv(item, height), self.channel_blocks)
        row = T.floormod(item, height)
        place = (image, block, row)

        def emit_tile(start: Expr, width: int, position: int | None) -> None:
            if position is None:
                self._pixels(buffers, place, start, width, (0, self.kernel[1]))
                return
            for pixel in range(position, position + width):
                self._pixels(buffers, place, pixel, 1, self._known_taps(pixel))

        self.geometry.for_each_tile(_PIXELS, emit_tile)

    def _known_taps(self, pixel: int) -> tuple[int, int]:
        """First tap column inside the image, and one past the last."""
        inside = [t for t in range(self.kernel[1]) if self.geometry.has_column(pixel, t)]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def _pixels(
        self,
        buffers: tuple[Buffer, ...],
        place: tuple[Expr, Expr, Expr],
        start: Expr,
        width: int,
        taps: tuple[int, int],
    ) -> None:
        """Neighbouring pixels that have the same taps inside the image."""
        x, y = buffers
        image, block, row = place
        first = constant(self._least() if self.mode == "max" else 0.0, self.dtype)
        totals = local(width * LANES, self.dtype)
        for pixel in range(width):
            store(totals, [ramp(pixel * LANES)], first)
        rows = self.geometry.tap_rows(row)
        with T.serial(*rows) as tap_row, T.serial(*taps) as tap:
            for pixel in range(width):
                column = self.geometry.column(start + pixel, tap)
                value = x[image, block, self.geometry.row(row, tap_row), column, ramp(0)]
                lane = ramp(pixel * LANES)
                store(totals, [lane], combined(self.mode, totals[lane], value, self.dtype))
        for pixel in range(width):
            result = totals[ramp(pixel * LANES)]
            if self.mode == "average":
                result = result * splat(self._reciprocal(row, start + pixel, rows, taps))
            store(y, [image, block, row, start + pixel, ramp(0)], result)

    def _least(self) -> float:
        """What every number of the type is at least."""
        return -math.inf if self.dtype == "float32" else float(np.iinfo(self.dtype).min)

    def _reciprocal(
        self, row: Expr, column: Expr, rows: tuple[Expr, Expr], taps: tuple[int, int]
    ) -> Expr:
        if self.divisor:
            return T.float32(1.0 / self.divisor)
        if self.count_padding:
            count = self._padded_taps(row, 0) * self._padded_taps(column, 1)
        else:
            count = (rows[1] - rows[0]) * (taps[1] - taps[0])
        return T.float32(1.0) / T.cast(count, "float32")

    def _padded_taps(self, position: Expr, axis: int) -> Expr:
        """Taps inside the padded image; a window that rounding up adds may reach past it."""
        origin = position * self.stride[axis] - self.padding[axis]
        return T.min(origin + self.kernel[axis], self.size[axis] + self.padding[axis]) - origin


@dataclass(frozen=True)
class GlobalAverage(Kernel):
    """Average over the pixels of each channel; the result is ``[N, C/16, 1, 1, 16]``.

    Attributes:
        batch: images.
        channel_blocks: blocks of 16 channels.
        pixels: pixels of an image.
    """

    batch: int
    channel_blocks: int
    pixels: int

    @property
    def family(self) -> str:
        """``global_average``."""
        return "global_average"

    @property
    def extent(self) -> int:
        """Images times channel blocks."""
        return self.batch * self.channel_blocks

    @property
    def operations(self) -> int:
        """Elements read, a vector counted as four."""
        return self.extent * self.pixels * 4

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        return (
            Parameter("x", (self.extent, self.pixels, LANES)),
            Parameter("y", (self.extent, LANES)),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One block of channels, in four independent sums."""
        x, y = buffers
        splits = 4 if self.pixels >= 4 else 1
        sums = local(splits * LANES)
        for split in range(splits):
            store(sums, [ramp(split * LANES)], number(0.0))
        with T.serial(0, self.pixels // splits) as group:
            for split in range(splits):
                lane = ramp(split * LANES)
                store(sums, [lane], sums[lane] + x[item, group * splits + split, ramp(0)])
        for rest in range(self.pixels // splits * splits, self.pixels):
            store(sums, [ramp(0)], sums[ramp(0)] + x[item, rest, ramp(0)])
        total = sums[ramp(0)]
        for split in range(1, splits):
            total = total + sums[ramp(split * LANES)]
        store(y, [item, ramp(0)], total * number(1.0 / self.pixels))
