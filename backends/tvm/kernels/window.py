"""Slices and constant padding in blocked layout, composed into one copy, and concatenation."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    constant,
    ramp,
    store,
)


@dataclass(frozen=True)
class Window(Kernel):
    """``y[n, c, h, w] = x[n, c + c0, h * sh + h0, w * sw + w0]``, or `value` outside of x.

    One work item is one output row of one block of channels. A shift of channels that is not a
    multiple of 16 copies each block in two runs of lanes.

    Attributes:
        batch: images.
        channels: logical input channels.
        size: input height and width.
        output_channels: logical output channels.
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
    def extent(self) -> int:
        """Images times output channel blocks times output rows."""
        return self.batch * blocks(self.output_channels) * self.output_size[0]

    @property
    def operations(self) -> int:
        """Elements written."""
        return self.extent * self.output_size[1] * LANES

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        return (
            Parameter("x", (self.batch, blocks(self.channels), *self.size, LANES), self.dtype),
            Parameter(
                "y",
                (self.batch, blocks(self.output_channels), *self.output_size, LANES),
                self.dtype,
            ),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row."""
        height = self.output_size[0]
        count = blocks(self.output_channels)
        image = T.floordiv(item, height * count)
        block = T.floormod(T.floordiv(item, height), count)
        row = T.floormod(item, height)
        for known in range(count):
            with T.If(block == known), T.Then():
                self._row(buffers, (image, known, row))

    def _row(self, buffers: tuple[Buffer, ...], place: tuple[Expr, int, Expr]) -> None:
        x, y = buffers
        image, block, row = place
        source_row = row * self.step[0] + self.start[1]
        with T.serial(0, self.output_size[1]) as column:
            source_column = column * self.step[1] + self.start[2]
            store(y, [image, block, row, column, ramp(0)], constant(self.value, self.dtype))
            for lane, length, source in self._runs(block):
                with T.If(self._inside(source_row, source_column)), T.Then():
                    store(
                        y,
                        [image, block, row, column, ramp(lane, length)],
                        x[
                            image,
                            source // LANES,
                            source_row,
                            source_column,
                            ramp(source % LANES, length),
                        ],
                    )

    def _inside(self, row: Expr, column: Expr) -> Expr:
        return T.And(T.And(row >= 0, row < self.size[0]), T.And(column >= 0, column < self.size[1]))

    def _runs(self, block: int) -> list[tuple[int, int, int]]:
        """Runs of lanes of an output block as (first lane, length, first source channel)."""
        runs: list[tuple[int, int, int]] = []
        for lane in range(LANES):
            source = block * LANES + lane + self.start[0]
            exists = 0 <= source < self.channels
            if not exists or block * LANES + lane >= self.output_channels:
                continue
            joined = runs and runs[-1][0] + runs[-1][1] == lane and source % LANES
            if joined:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
            else:
                runs.append((lane, 1, source))
        return [piece for run in runs for piece in _powers_of_two(run)]


def _powers_of_two(run: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    lane, length, source = run
    cut = []
    while length:
        part = 1 << (length.bit_length() - 1)
        cut.append((lane, part, source))
        lane, length, source = lane + part, length - part, source + part
    return cut


@dataclass(frozen=True)
class Concat(Kernel):
    """Concatenates contiguous pieces: ``[outer, sum of lengths]``.

    One work item is one outer row; a piece of a row is contiguous on both sides. Blocked arrays
    join along whole channel blocks, plain ones along any axis.

    Attributes:
        outer: elements of the axes before the joined one.
        lengths: elements of each input behind it.
        dtype: element type.
    """

    outer: int
    lengths: tuple[int, ...]
    dtype: str = "float32"

    @property
    def family(self) -> str:
        """``concat``."""
        return "concat"

    @property
    def extent(self) -> int:
        """Outer rows times inputs."""
        return self.outer * len(self.lengths)

    @property
    def operations(self) -> int:
        """Elements copied."""
        return self.outer * sum(self.lengths)

    def parameters(self) -> tuple[Parameter, ...]:
        """Inputs, output."""
        return (
            *(
                Parameter(f"x{i}", (self.outer, length), self.dtype)
                for i, length in enumerate(self.lengths)
            ),
            Parameter("y", (self.outer, sum(self.lengths)), self.dtype),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One piece of one row."""
        *inputs, y = buffers
        row, piece = T.floordiv(item, len(inputs)), T.floormod(item, len(inputs))
        offset = 0
        for index, (x, length) in enumerate(zip(inputs, self.lengths, strict=True)):
            with T.If(piece == index), T.Then():
                _copy_run(x, y, row, offset, length)
            offset += length


def _copy_run(x: Buffer, y: Buffer, row: Expr, offset: int, length: int) -> None:
    whole = length // LANES * LANES
    if whole:
        with T.serial(0, whole // LANES) as index:
            store(y, [row, ramp(index * LANES + offset)], x[row, ramp(index * LANES)])
    if length > whole:
        with T.serial(whole, length) as index:
            store(y, [row, index + offset], x[row, index])
