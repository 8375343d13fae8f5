"""Conversions between plain NCHW and blocked ``[N, C/16, H*W, 16]``, and transposition."""

from abc import abstractmethod
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    ceil_div,
    constant,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes
from shohin.backends.tvm.kernels.transposition import transposed


@dataclass(frozen=True)
class _Conversion(Kernel):
    """Common form of both directions: sixteen channels of sixteen pixels at a time.

    Attributes:
        batch: images.
        channels: logical channels; the last block's missing lanes are zero.
        pixels: pixels of an image.
        source: element type of the input.
        result: element type of the output, another one only where there are steps.
        steps: on every vector of 16 channels, or of pixels; without operands.
    """

    batch: int
    channels: int
    pixels: int
    source: str = "float32"
    result: str = "float32"
    steps: tuple[Step, ...] = ()

    @property
    def extent(self) -> int:
        """Images times channel blocks."""
        return self.batch * blocks(self.channels)

    @property
    def operations(self) -> int:
        """Elements, read and written."""
        return self.batch * self.channels * self.pixels * 2

    @property
    def _plain(self) -> tuple[int, ...]:
        return (self.batch, self.channels, self.pixels)

    @property
    def _blocked(self) -> tuple[int, ...]:
        return (self.batch, blocks(self.channels), self.pixels, LANES)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One block of one image."""
        count = blocks(self.channels)
        place = T.floordiv(item, count), T.floormod(item, count)
        whole_or_rest(
            place[1], LANES, self.channels, lambda lanes: self._block(buffers, place, lanes)
        )

    def _block(self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr], lanes: int) -> None:
        """The block of so many channels. The last pixels overlap with those before."""
        steps = ceil_div(self.pixels, LANES)
        with T.serial(0, steps) as step:
            first = step * LANES
            if self.pixels % LANES:
                first = T.min(first, max(0, self.pixels - LANES))
            self._pixels(buffers, place, lanes, first)

    def _finished(self, vector: Expr) -> Expr:
        """A vector as it is stored."""
        if not self.steps:
            return vector
        value = vector if self.source == "float32" else T.cast(vector, f"int32x{LANES}")
        found = apply_steps(self.steps, value, (), lambda _: value, lambda _: value)
        return found if self.result == "float32" else T.cast(found, f"{self.result}x{LANES}")

    @abstractmethod
    def _pixels(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr], lanes: int, first: Expr
    ) -> None:
        """Sixteen pixels, or all where there are fewer, of so many channels of a block."""


@dataclass(frozen=True)
class ToBlocked(_Conversion):
    """Plain to blocked."""

    @property
    def family(self) -> str:
        """``to_blocked``."""
        return "to_blocked"

    def parameters(self) -> tuple[Parameter, ...]:
        """Plain input, blocked output."""
        return (
            Parameter("x", self._plain, self.source),
            Parameter("y", self._blocked, self.result),
        )

    def _pixels(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr], lanes: int, first: Expr
    ) -> None:
        x, y = buffers
        image, block = place

        def row(lane: int) -> Expr:
            channel = block * LANES + lane
            return load_lanes(x, lambda last: [image, channel, last], first, self.pixels)

        zero = constant(0, self.source)
        rows = [row(lane) if lane < lanes else zero for lane in range(LANES)]
        for pixel, vector in enumerate(transposed(rows, self.source)[: self.pixels]):
            store(y, [image, block, first + pixel, ramp(0)], self._finished(vector))


@dataclass(frozen=True)
class ToPlain(_Conversion):
    """Blocked to plain."""

    @property
    def family(self) -> str:
        """``to_plain``."""
        return "to_plain"

    def parameters(self) -> tuple[Parameter, ...]:
        """Blocked input, plain output."""
        return (
            Parameter("x", self._blocked, self.source),
            Parameter("y", self._plain, self.result),
        )

    def _pixels(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr], lanes: int, first: Expr
    ) -> None:
        x, y = buffers
        image, block = place

        def row(pixel: int) -> Expr:
            return x[image, block, first + pixel, ramp(0)]

        zero = constant(0, self.source)
        rows = [row(pixel) if pixel < self.pixels else zero for pixel in range(LANES)]
        for lane, vector in enumerate(transposed(rows, self.source)[:lanes]):
            channel = block * LANES + lane

            def there(last: Expr, channel: Expr = channel) -> list[Expr]:
                return [image, channel, last]

            store_lanes(y, there, first, self._finished(vector), self.pixels)


@dataclass(frozen=True)
class Transpose(Kernel):
    """``[B, M, N]`` to ``[B, N, M]``.

    Attributes:
        batch: B.
        rows: M.
        columns: N.
    """

    batch: int
    rows: int
    columns: int

    @property
    def family(self) -> str:
        """``transpose``."""
        return "transpose"

    @property
    def extent(self) -> int:
        """Rows of the result."""
        return self.batch * self.columns

    @property
    def operations(self) -> int:
        """Elements moved, counted twice."""
        return self.batch * self.rows * self.columns * 2

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        return (
            Parameter("x", (self.batch, self.rows, self.columns)),
            Parameter("y", (self.batch, self.columns, self.rows)),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row of the result."""
        x, y = buffers
        image, column = T.floordiv(item, self.columns), T.floormod(item, self.columns)
        with T.serial(0, self.rows) as row:
            store(y, [image, column, row], x[image, row, column])


@dataclass(frozen=True)
class Copy(Kernel):
    """Copies a run of a contiguous array, where a view would not be aligned or owned.

    Attributes:
        size: elements of the source.
        offset: first element copied.
        count: elements copied.
        dtype: element type.
    """

    size: int
    offset: int
    count: int
    dtype: str = "float32"

    @property
    def family(self) -> str:
        """``copy``."""
        return "copy"

    @property
    def extent(self) -> int:
        """One: a copy is bound by memory."""
        return 1

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        return (
            Parameter("x", (self.size,), self.dtype),
            Parameter("y", (self.count,), self.dtype),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Everything."""
        x, y = buffers
        with T.serial(0, self.count) as index:
            store(y, [index], x[index + self.offset])
