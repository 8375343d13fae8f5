"""Depthwise convolution in blocked layout: every channel has one filter of its own."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    local,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps


@dataclass(frozen=True)
class DepthwiseConv2d(Kernel):
    """One work item is one output row of one block of 16 channels.

    Attributes:
        batch: images.
        channels: channels in whole blocks.
        size: input height and width.
        kernel: height and width of a filter.
        stride: vertical and horizontal.
        padding: (top, bottom, left, right), zeros.
        dilation: vertical and horizontal.
        width: output pixels of a tile.
        steps: element-wise steps on the result.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    width: int
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``depthwise``."""
        return "depthwise"

    @property
    def output_size(self) -> tuple[int, int]:
        """Output height and width."""
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return (
            (self.size[0] + top + bottom - reach[0]) // self.stride[0] + 1,
            (self.size[1] + left + right - reach[1]) // self.stride[1] + 1,
        )

    @property
    def extent(self) -> int:
        """Images times channel blocks times output rows."""
        return self.batch * (self.channels // LANES) * self.output_size[0]

    @property
    def operations(self) -> int:
        """Multiply-accumulates."""
        height, width = self.output_size
        return self.batch * self.channels * height * width * self.kernel[0] * self.kernel[1]

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        return (self.channels // LANES, *self.kernel, LANES)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, bias, step operands, output."""
        count = self.channels // LANES
        output = (self.batch, count, *self.output_size, LANES)
        operands = [
            Parameter(f"operand{i}", output if step.operand == "full" else (self.channels,))
            for i, step in enumerate(s for s in self.steps if s.operand != "none")
        ]
        return (
            Parameter("x", (self.batch, count, *self.size, LANES)),
            Parameter("weight", self.weight_shape()),
            Parameter("bias", (self.channels,)),
            *operands,
            Parameter("y", output),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row."""
        x, weight, bias, *operands, y = buffers
        height, out_width = self.output_size
        count = self.channels // LANES
        image = T.floordiv(item, height * count)
        block = T.floormod(T.floordiv(item, height), count)
        row = T.floormod(item, height)

        def tile(start: Expr, width: int, position: int | None) -> None:
            sums = local(width * LANES)
            for pixel in range(width):
                store(sums, [ramp(pixel * LANES)], bias[ramp(block * LANES)])
            self._taps(sums, x, weight, (image, block, row), start, width, position)
            for pixel in range(width):
                place = (image, block, row, start + pixel, ramp(0))
                result = apply_steps(
                    self.steps,
                    sums[ramp(pixel * LANES)],
                    tuple(operands),
                    lambda buffer, place=place: buffer[place],
                    lambda buffer: buffer[ramp(block * LANES)],
                )
                store(y, list(place), result)

        interior = [s for s in range(0, out_width, self.width) if self._inside(s)]
        for start in range(0, out_width, self.width):
            if start not in interior:
                tile(start, min(self.width, out_width - start), start)
        if interior:
            with T.serial(0, len(interior)) as index:
                tile(interior[0] + index * self.width, self.width, None)

    def _inside(self, start: int) -> bool:
        last = start + self.width - 1
        return (
            last < self.output_size[1]
            and self._valid(start, 0)
            and self._valid(last, self.kernel[1] - 1)
        )

    def _valid(self, pixel: int, tap_column: int) -> bool:
        column = pixel * self.stride[1] - self.padding[2] + tap_column * self.dilation[1]
        return 0 <= column < self.size[1]

    def _taps(
        self,
        sums: Buffer,
        x: Buffer,
        weight: Buffer,
        place: tuple[Expr, Expr, Expr],
        start: Expr,
        width: int,
        position: int | None,
    ) -> None:
        image, block, row = place
        top = row * self.stride[0] - self.padding[0]
        step = self.dilation[0]
        low = T.max(0, T.floordiv(step - 1 - top, step))
        high = T.min(self.kernel[0], T.floordiv(self.size[0] - 1 - top, step) + 1)
        with T.serial(low, high) as tap_row:
            for tap_column in range(self.kernel[1]):
                taps = weight[block, tap_row, tap_column, ramp(0)]
                for pixel in range(width):
                    if position is not None and not self._valid(position + pixel, tap_column):
                        continue
                    column = (
                        (start + pixel) * self.stride[1]
                        - self.padding[2]
                        + tap_column * self.dilation[1]
                    )
                    lane = ramp(pixel * LANES)
                    value = x[image, block, top + tap_row * step, column, ramp(0)]
                    store(sums, [lane], sums[lane] + value * taps)
