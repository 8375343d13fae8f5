"""Element-wise chains over a whole array, for what could not be fused into a producer."""

from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    ceil_div,
    ramp,
    splat,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.partial import for_each_vector, load_lanes, store_lanes

_CHUNK = 1024


@dataclass(frozen=True)
class Pointwise(Kernel):
    """``y = steps(x)`` over ``[outer, channels, inner]`` elements.

    A blocked array is ``[N, C/16, H*W*16]`` with the channel along the last 16 elements; a plain
    one is ``[N, C, H*W]``; a matrix whose channel is its last axis is ``[M, 1, N]``.

    Attributes:
        outer: elements of the axes before the channel.
        channels: channels, or blocks of them.
        inner: elements after the channel.
        channel: where per-channel operands vary: along ``lanes`` (blocked), ``rows`` (plain) or
            ``inner`` (the last axis).
        steps: element-wise steps.
        source: element type of the input; integers are widened to 32 bits.
        result: element type of the output.
    """

    outer: int
    channels: int
    inner: int
    channel: str
    steps: tuple[Step, ...]
    source: str = "float32"
    result: str = "float32"

    @property
    def family(self) -> str:
        """``pointwise``."""
        return "pointwise"

    @property
    def _whole(self) -> bool:
        """Whether rows do not matter, so that the array is one line cut in chunks."""
        return all(step.operand != "channel" for step in self.steps)

    @property
    def _rows(self) -> int:
        return 1 if self._whole else self.outer * self.channels

    @property
    def _length(self) -> int:
        return self.outer * self.channels * self.inner // self._rows

    @property
    def extent(self) -> int:
        """Rows, or chunks of 1024 elements where rows do not matter."""
        return ceil_div(self._length, _CHUNK) if self._whole else self._rows

    @property
    def operations(self) -> int:
        """Elements times steps."""
        return self.outer * self.channels * self.inner * (1 + len(self.steps))

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, step operands, output."""
        shape = (self._rows, self._length)
        width = {"lanes": self.channels * LANES, "rows": self.channels, "inner": self.inner}
        return (
            Parameter("x", shape, self.source),
            *operand_parameters(self.steps, shape, width[self.channel]),
            Parameter("y", shape, self.result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row or chunk."""
        x, *operands, y = buffers
        row = 0 if self._whole else item
        channel_row = T.floormod(item, self.channels)

        def vector(start: Expr, valid: int) -> None:
            def place(last: Expr) -> list[Expr]:
                return [row, last]

            def load_channel(buffer: Buffer) -> Expr:
                if self.channel == "lanes":
                    return buffer[ramp(channel_row * LANES)]
                if self.channel == "rows":
                    return splat(buffer[channel_row])
                return load_lanes(buffer, lambda last: [last], start, valid)

            value = load_lanes(x, place, start, valid)
            if self.source != "float32":
                value = T.cast(value, f"int32x{LANES}")
            result = apply_steps(
                self.steps,
                value,
                tuple(operands),
                lambda buffer: load_lanes(buffer, place, start, valid),
                load_channel,
            )
            if self.result != "float32":
                result = T.cast(result, f"{self.result}x{LANES}")
            store_lanes(y, place, start, result, valid)

        if not self._whole:
            for_each_vector(self.inner, vector)
            return

        def chunk(length: int) -> None:
            for_each_vector(length, lambda at, valid: vector(item * _CHUNK + at, valid))

        whole_or_rest(item, _CHUNK, self._length, chunk)
