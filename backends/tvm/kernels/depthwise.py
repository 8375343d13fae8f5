"""Depthwise convolution in blocked layout: every channel has one filter of its own."""

from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.conv_tiles import tile_options
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
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry


@dataclass(frozen=True)
class DepthwiseConv2d(Kernel):
    """One work item is one output row of one block of 16 channels.

    Attributes:
        batch: images.
        channels: channels in whole blocks.
        geometry: sizes, stride, padding.
        width: output pixels of a tile.
        steps: element-wise steps on the result.
        output_blocks: blocks of channels from one output image to the next; 0 for those computed.
        source: element type of the input and the weights; sums of integers have `sum_type`.
        weight_type: element type of the weights.
        sum_type: element type of the bias and the sums.
        result: element type of the output.
    """

    batch: int
    channels: int
    geometry: Geometry
    width: int
    steps: tuple[Step, ...] = ()
    output_blocks: int = 0
    source: str = "float32"
    weight_type: str = "float32"
    sum_type: str = "float32"
    result: str = "float32"

    tiling = frozenset({"width"})

    @property
    def family(self) -> str:
        """``depthwise``."""
        return "depthwise"

    @property
    def extent(self) -> int:
        """Images times channel blocks times output rows."""
        return self.batch * (self.channels // LANES) * self.geometry.output_size[0]

    @property
    def operations(self) -> int:
        """Multiply-accumulates."""
        (height, width), (rows, columns) = self.geometry.output_size, self.geometry.kernel
        return self.batch * self.channels * height * width * rows * columns

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The convolution with narrower and wider tiles."""
        # Inputs are vectors as well, not one number in every lane: they need room of their own.
        room = min(12, max(3, registers - 2))
        options = tile_options(self.geometry.output_size[1], 1, room, 1)
        return tuple(replace(self, width=tile.width) for tile in options)

    def tile_text(self) -> str:
        """Pixels."""
        return str(self.width)

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        return (self.channels // LANES, *self.geometry.kernel, LANES)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, bias, step operands, output."""
        count = self.channels // LANES
        output = (self.batch, count, *self.geometry.output_size, LANES)
        stored = (self.batch, self.output_blocks or count, *output[2:])
        return (
            Parameter("x", (self.batch, count, *self.geometry.size, LANES), self.source),
            Parameter("weight", self.weight_shape(), self.weight_type),
            Parameter("bias", (self.channels,), self.sum_type),
            *operand_parameters(self.steps, output, self.channels),
            Parameter("y", stored, self.result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row."""
        x, weight, bias, *operands, y = buffers
        height = self.geometry.output_size[0]
        count = self.channels // LANES
        image = T.floordiv(item, height * count)
        block = T.floormod(T.floordiv(item, height), count)
        row = T.floormod(item, height)

        def emit_tile(start: Expr, width: int, position: int | None) -> None:
            sums = local(width * LANES, self.sum_type)
            for pixel in range(width):
                store(sums, [ramp(pixel * LANES)], bias[ramp(block * LANES)])
            self._taps(sums, x, weight, (image, block, row), start, width, position)
            for pixel in range(width):
                finish(sums[ramp(pixel * LANES)], (image, block, row, start + pixel, ramp(0)))

        def finish(total: Expr, place: tuple[Expr, ...]) -> None:
            result = apply_steps(
                self.steps,
                total,
                tuple(operands),
                lambda buffer: buffer[place],
                lambda buffer: buffer[ramp(block * LANES)],
            )
            if self.result != "float32":
                result = T.cast(result, f"{self.result}x{LANES}")
            store(y, list(place), result)

        self.geometry.for_each_tile(self.width, emit_tile)

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
        low, high = self.geometry.tap_rows(row)
        with T.serial(low, high) as tap_row:
            for tap in range(self.geometry.kernel[1]):
                taps = self._widened(weight[block, tap_row, tap, ramp(0)], self.weight_type)
                for pixel in range(width):
                    if position is not None and not self.geometry.has_column(position + pixel, tap):
                        continue
                    column = self.geometry.column(start + pixel, tap)
                    source_row = self.geometry.row(row, tap_row)
                    value = self._widened(x[image, block, source_row, column, ramp(0)], self.source)
                    lane = ramp(pixel * LANES)
                    store(sums, [lane], sums[lane] + value * taps)

    def _widened(self, value: Expr, dtype: str) -> Expr:
        return value if dtype == self.sum_type else T.cast(value, f"{self.sum_type}x{LANES}")
