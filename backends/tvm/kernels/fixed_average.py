"""Averages of integers over windows: sums times a whole number, shifted."""

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
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps
from shohin.backends.tvm.kernels.geometry import Geometry

_SUMS = 4
"""Independent sums of a window, which hide the latency of an addition."""


@dataclass(frozen=True)
class FixedAverage(Kernel):
    """One work item is one output row of one block of 16 channels.

    Attributes:
        batch: images.
        channel_blocks: blocks of 16 channels.
        geometry: the windows; pixels of the padding are zeros.
        multiplier: what sums are multiplied with.
        source: element type of the input.
        result: element type of the output.
        wide: whether products have 64 bits.
        steps: on the products, the first of which rescales them.
        output_blocks: blocks of channels from one output image to the next; 0 for its own.
    """

    batch: int
    channel_blocks: int
    geometry: Geometry
    multiplier: int
    source: str
    result: str
    wide: bool
    steps: tuple[Step, ...]
    output_blocks: int = 0

    @property
    def family(self) -> str:
        """``fixed_average``."""
        return "fixed_average"

    @property
    def extent(self) -> int:
        """Images times channel blocks times output rows."""
        return self.batch * self.channel_blocks * self.geometry.output_size[0]

    @property
    def operations(self) -> int:
        """Elements read, a vector counted as four."""
        taps = self.geometry.kernel[0] * self.geometry.kernel[1]
        return self.extent * self.geometry.output_size[1] * taps * 4

    @property
    def sum_type(self) -> str:
        """Element type of the sums of windows."""
        taps = self.geometry.kernel[0] * self.geometry.kernel[1]
        largest = taps << (int(self.source.removeprefix("int")) - 1)
        return "int32" if largest < 1 << 31 else "int64"

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        stored = self.output_blocks or self.channel_blocks
        return (
            Parameter(
                "x", (self.batch, self.channel_blocks, *self.geometry.size, LANES), self.source
            ),
            Parameter("y", (self.batch, stored, *self.geometry.output_size, LANES), self.result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row."""
        height = self.geometry.output_size[0]
        image = T.floordiv(item, height * self.channel_blocks)
        block = T.floormod(T.floordiv(item, height), self.channel_blocks)
        row = T.floormod(item, height)

        def emit_tile(start: Expr, width: int, position: int | None) -> None:
            taps = range(self.geometry.kernel[1])
            if position is not None:
                taps_inside = [t for t in taps if self.geometry.has_column(position, t)]
                taps = range(taps_inside[0], taps_inside[-1] + 1) if taps_inside else range(0)
            self._pixel(buffers, (image, block, row), start, taps)

        self.geometry.for_each_tile(1, emit_tile)

    def _pixel(
        self,
        buffers: tuple[Buffer, ...],
        place: tuple[Expr, Expr, Expr],
        pixel: Expr,
        taps: range,
    ) -> None:
        x, y = buffers
        image, block, row = place
        kind = self.sum_type
        sums = local(_SUMS * LANES, kind)
        zero = T.int64(0) if kind == "int64" else T.int32(0)
        for index in range(_SUMS):
            store(sums, [ramp(index * LANES)], splat(zero))

        def add(index: int, tap_row: Expr, tap: Expr) -> None:
            column = self.geometry.column(pixel, tap)
            value = x[image, block, self.geometry.row(row, tap_row), column, ramp(0)]
            lane = ramp(index * LANES)
            store(sums, [lane], sums[lane] + T.cast(value, f"{kind}x{LANES}"))

        with T.serial(*self.geometry.tap_rows(row)) as tap_row:
            whole, rest = divmod(len(taps), _SUMS)
            with T.serial(0, whole) as group:
                for index in range(_SUMS):
                    add(index, tap_row, taps.start + group * _SUMS + index)
            for index in range(rest):
                add(index, tap_row, taps.start + whole * _SUMS + index)
        parts = [sums[ramp(index * LANES)] for index in range(_SUMS)]
        store(y, [image, block, row, pixel, ramp(0)], self._finish(sum(parts[1:], parts[0])))

    def _finish(self, total: Expr) -> Expr:
        if self.wide:
            total = T.cast(total, f"int64x{LANES}") * splat(T.int64(self.multiplier))
        elif self.multiplier != 1:
            total = total * splat(T.int32(self.multiplier))
        result = apply_steps(self.steps, total, (), lambda _: total, lambda _: total)
        return result if self.result == "float32" else T.cast(result, f"{self.result}x{LANES}")
