"""Conversions between plain NCHW and blocked ``[N, C/16, H*W, 16]``, and transposition."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    number,
    ramp,
    store,
)


@dataclass(frozen=True)
class _Conversion(Kernel):
    """Common form of both directions.

    Attributes:
        batch: images.
        channels: logical channels; the last block's missing lanes are zero.
        pixels: pixels of an image.
    """

    batch: int
    channels: int
    pixels: int

    @property
    def extent(self) -> int:
        """Images times channel blocks."""
        return self.batch * blocks(self.channels)

    @property
    def operations(self) -> int:
        """Elements moved, scattered ones counted as two."""
        return self.batch * self.channels * self.pixels * 2

    @property
    def _plain(self) -> tuple[int, ...]:
        return (self.batch, self.channels, self.pixels)

    @property
    def _blocked(self) -> tuple[int, ...]:
        return (self.batch, blocks(self.channels), self.pixels, LANES)

    def _place(self, item: Expr) -> tuple[Expr, Expr]:
        count = blocks(self.channels)
        return T.floordiv(item, count), T.floormod(item, count)


@dataclass(frozen=True)
class ToBlocked(_Conversion):
    """Plain to blocked."""

    @property
    def family(self) -> str:
        """``to_blocked``."""
        return "to_blocked"

    def parameters(self) -> tuple[Parameter, ...]:
        """Plain input, blocked output."""
        return Parameter("x", self._plain), Parameter("y", self._blocked)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One block of one image."""
        x, y = buffers
        image, block = self._place(item)
        ragged = self.channels % LANES
        with T.serial(0, self.pixels) as pixel:
            if ragged:
                store(y, [image, block, pixel, ramp(0)], number(0.0))
            lanes = T.min(LANES, self.channels - block * LANES) if ragged else LANES
            with T.serial(0, lanes) as lane:
                store(y, [image, block, pixel, lane], x[image, block * LANES + lane, pixel])


@dataclass(frozen=True)
class ToPlain(_Conversion):
    """Blocked to plain."""

    @property
    def family(self) -> str:
        """``to_plain``."""
        return "to_plain"

    def parameters(self) -> tuple[Parameter, ...]:
        """Blocked input, plain output."""
        return Parameter("x", self._blocked), Parameter("y", self._plain)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One block of one image."""
        x, y = buffers
        image, block = self._place(item)
        lanes = T.min(LANES, self.channels - block * LANES) if self.channels % LANES else LANES
        with T.serial(0, lanes) as lane, T.serial(0, self.pixels) as pixel:
            store(y, [image, block * LANES + lane, pixel], x[image, block, pixel, lane])


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
