"""Kernels with a thread for every element: chains of steps, windows, copies."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import PointKernel, finish, larger, put, taken
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Parameter, constant, local, store
from shohin.backends.tvm.kernels.epilogue import Step, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry

Mode = Literal["max", "average"]


@dataclass(frozen=True)
class Elementwise(PointKernel):
    """A chain of steps over ``[outer, channels, inner]``.

    Attributes:
        outer: elements of the axes before the channels.
        channels: how many.
        inner: elements of a channel.
        steps: what is done.
        source: element type of the input.
        result: element type of the output.
    """

    outer: int
    channels: int
    inner: int
    steps: tuple[Step, ...]
    source: str = "float32"
    result: str = "float32"

    @property
    def family(self) -> str:
        """``elementwise``."""
        return "elementwise"

    @property
    def elements(self) -> int:
        """Of the result."""
        return self.outer * self.channels * self.inner

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, step operands, output."""
        shape = (self.elements,)
        return (
            Parameter("x", shape, self.source),
            *operand_parameters(self.steps, shape, self.channels),
            Parameter("y", shape, self.result),
        )

    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One element."""
        x, *operands, y = buffers
        channel = T.floormod(T.floordiv(index, self.inner), self.channels)
        value = taken(x[index], self.source)
        put(y, index, finish(self.steps, value, tuple(operands), index, channel), self.result)


@dataclass(frozen=True)
class Copy(PointKernel):
    """Puts ``[outer, length]`` behind an offset of the rows of ``[outer, whole]``.

    Attributes:
        outer: rows.
        length: elements of a row that is copied.
        whole: elements of a row of the result.
        offset: where in it the copy begins.
        dtype: element type.
    """

    outer: int
    length: int
    whole: int
    offset: int
    dtype: str = "float32"

    @property
    def family(self) -> str:
        """``copy``."""
        return "copy"

    @property
    def elements(self) -> int:
        """That are copied."""
        return self.outer * self.length

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        return (
            Parameter("x", (self.elements,), self.dtype),
            Parameter("y", (self.outer * self.whole,), self.dtype),
        )

    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One element."""
        x, y = buffers
        row, column = T.floordiv(index, self.length), T.floormod(index, self.length)
        store(y, [row * self.whole + self.offset + column], x[index])


@dataclass(frozen=True)
class Window(PointKernel):
    """``y[n, c, h, w] = x[n, c + c0, h * sh + h0, w * sw + w0]``, or `value` outside of x.

    Attributes:
        batch: images.
        channels: of the input.
        size: input height and width.
        output_channels: of the output.
        output_size: output height and width.
        start: (c0, h0, w0), negative for padding in front.
        step: (sh, sw).
        value: what lies outside of the input.
        dtype: element type.
    """

    batch: int
    channels: int
    size: tuple[int, int]
    output_channels: int
    output_size: tuple[int, int]
    start: tuple[int, int, int]
    step: tuple[int, int]
    value: float = 0.0
    dtype: str = "float32"

    @property
    def family(self) -> str:
        """``window``."""
        return "window"

    @property
    def elements(self) -> int:
        """Of the output."""
        return self.batch * self.output_channels * math.prod(self.output_size)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        size = self.batch * self.channels * math.prod(self.size)
        return Parameter("x", (size,), self.dtype), Parameter("y", (self.elements,), self.dtype)

    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One element."""
        x, y = buffers
        height, width = self.output_size
        row = T.floormod(T.floordiv(index, width), height)
        channel = T.floormod(T.floordiv(index, height * width), self.output_channels)
        image = T.floordiv(index, height * width * self.output_channels)
        from_channel = T.bind(channel + self.start[0])
        from_row = T.bind(row * self.step[0] + self.start[1])
        from_column = T.bind(T.floormod(index, width) * self.step[1] + self.start[2])
        inside = T.And(
            _within(from_channel, self.channels),
            T.And(_within(from_row, self.size[0]), _within(from_column, self.size[1])),
        )
        place = image * self.channels + from_channel
        place = (place * self.size[0] + from_row) * self.size[1] + from_column
        outside = constant(self.value, self.dtype, 1)
        store(y, [index], T.if_then_else(inside, x[place], outside))


def _within(index: Expr, size: int) -> Expr:
    return T.And(index >= 0, index < size)


@dataclass(frozen=True)
class Pool2d(PointKernel):
    """Maximum or average over windows.

    Attributes:
        mode: which.
        planes: images times channels.
        geometry: of the windows; its padding says only where they begin.
        output_size: height and width, which rounding up may enlarge.
        reach: height and width up to which an average counts padded zeros, as far as they lie
            behind the image; (0, 0) where it counts none.
        divisor: fixed divisor of an average, 0 for none.
        dtype: element type; integers have a maximum only.
    """

    mode: Mode
    planes: int
    geometry: Geometry
    output_size: tuple[int, int]
    reach: tuple[int, int] = (0, 0)
    divisor: int = 0
    dtype: str = "float32"

    @property
    def family(self) -> str:
        """``max_pool`` or ``average_pool``."""
        return f"{self.mode}_pool"

    @property
    def elements(self) -> int:
        """Of the output."""
        return self.planes * math.prod(self.output_size)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        size = self.planes * math.prod(self.geometry.size)
        return Parameter("x", (size,), self.dtype), Parameter("y", (self.elements,), self.dtype)

    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One window."""
        x, y = buffers
        shape, (height, width) = self.geometry, self.output_size
        plane = T.bind(T.floordiv(index, height * width))
        row, column = T.floormod(T.floordiv(index, width), height), T.floormod(index, width)
        held = local(1, self.dtype)
        store(held, [0], constant(self._start, self.dtype, 1))
        with T.serial(0, shape.kernel[0]) as down, T.serial(0, shape.kernel[1]) as right:
            source_row = T.bind(shape.row(row, down))
            source = T.bind(shape.column(column, right))
            inside = T.And(_within(source_row, shape.size[0]), _within(source, shape.size[1]))
            with T.If(inside), T.Then():
                value = x[(plane * shape.size[0] + source_row) * shape.size[1] + source]
                store(held, [0], self._with(held[0], value))
        result = held[0]
        if self.mode == "average":
            result = result / T.cast(self._count(row, column), "float32")
        store(y, [index], result)

    @property
    def _start(self) -> float:
        if self.mode == "average":
            return 0.0
        return -math.inf if self.dtype == "float32" else int(np.iinfo(self.dtype).min)

    def _with(self, held: Expr, value: Expr) -> Expr:
        if self.mode == "average":
            return held + value
        return larger(held, value) if self.dtype == "float32" else T.max(held, value)

    def _count(self, row: Expr, column: Expr) -> Expr:
        """What a sum is divided by."""
        if self.divisor:
            return T.int32(self.divisor)
        shape = self.geometry
        starts = (shape.row(row, 0), shape.column(column, 0))
        counts = []
        for start, taps, size, reach in zip(
            starts, shape.kernel, shape.size, self.reach, strict=True
        ):
            first = start if reach else T.max(start, 0)
            counts.append(T.min(start + taps, reach or size) - first)
        return counts[0] * counts[1]


@dataclass(frozen=True)
class FixedAverage(PointKernel):
    """Sums of integers over windows times a whole number, then steps.

    Attributes:
        planes: images times channels.
        channels: of an image.
        geometry: of the windows.
        multiplier: of the sums.
        source: element type of the input.
        result: element type of the output.
        wide: whether products need 64 bits.
        steps: on the products.
    """

    planes: int
    channels: int
    geometry: Geometry
    multiplier: int
    source: str
    result: str
    wide: bool
    steps: tuple[Step, ...]

    @property
    def family(self) -> str:
        """``fixed_average``."""
        return "fixed_average"

    @property
    def elements(self) -> int:
        """Of the output."""
        return self.planes * math.prod(self.geometry.output_size)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, step operands, output."""
        size = self.planes * math.prod(self.geometry.size)
        return (
            Parameter("x", (size,), self.source),
            *operand_parameters(self.steps, (self.elements,), self.channels),
            Parameter("y", (self.elements,), self.result),
        )

    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One window."""
        x, *operands, y = buffers
        shape, (height, width) = self.geometry, self.geometry.output_size
        plane = T.bind(T.floordiv(index, height * width))
        row, column = T.floormod(T.floordiv(index, width), height), T.floormod(index, width)
        kind = "int64" if self.wide else "int32"
        total = local(1, kind)
        store(total, [0], T.cast(T.int32(0), kind))
        with T.serial(0, shape.kernel[0]) as down, T.serial(0, shape.kernel[1]) as right:
            source_row = T.bind(shape.row(row, down))
            source = T.bind(shape.column(column, right))
            inside = T.And(_within(source_row, shape.size[0]), _within(source, shape.size[1]))
            with T.If(inside), T.Then():
                value = x[(plane * shape.size[0] + source_row) * shape.size[1] + source]
                store(total, [0], total[0] + T.cast(value, kind))
        product = total[0] * T.cast(T.int32(self.multiplier), kind)
        channel = T.floormod(plane, self.channels)
        put(y, index, finish(self.steps, product, tuple(operands), index, channel), self.result)
