"""A convolution and the 1 x 1 convolution that reads it, one row at a time.

A work item is one output row of an image: the first convolution writes its row of all middle
channels to scratch memory on the stack, which a cache of the first or second level holds, and the
second one reads it there. So the image between the two is never written to memory. All weights are
read for every row: this pays where they are few.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.conv2d import Conv2d, RowEmitter
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    local,
    ramp,
)
from shohin.backends.tvm.kernels.epilogue import operand_parameters

MOST_SCRATCH = 1 << 16
"""Bytes of a row of middle channels: stacks are small in programs linked against musl."""

MOST_WEIGHTS = 1 << 20
"""Bytes of both weights, beyond which reading them for every row costs more than it saves."""

_FIRST_TILES, _SECOND_TILES = 3, 2


@dataclass(frozen=True)
class ConvPair(Kernel):
    """Two convolutions in turn, the second one 1 x 1.

    Attributes:
        first: without steps.
        second: 1 x 1, with the steps; its image is what the first gives.
    """

    first: Conv2d
    second: Conv2d

    @property
    def family(self) -> str:
        """``conv_pair``."""
        return "conv_pair"

    @property
    def extent(self) -> int:
        """Images times output rows."""
        return self.first.batch * self.first.geometry.output_size[0]

    @property
    def operations(self) -> int:
        """Multiply-accumulates of both."""
        return self.first.operations + self.second.operations

    @property
    def scratch(self) -> int:
        """Floats of a row of middle channels."""
        return self.first.filters * self.first.geometry.output_size[1]

    @property
    def fits(self) -> bool:
        """Whether a row fits the scratch memory, and the weights are few enough."""
        shapes = (self.first.weight_shape(), self.second.weight_shape())
        weights = sum(Parameter("", shape).bytes for shape in shapes)
        return 4 * self.scratch <= MOST_SCRATCH and weights <= MOST_WEIGHTS

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The pair in the likeliest tiles of each of the two, together."""
        firsts = islice(_uncut(self.first, registers), _FIRST_TILES)
        seconds = [*islice(_uncut(self.second, registers), _SECOND_TILES)]
        pairs = [replace(self, first=one, second=two) for one in firsts for two in seconds]
        # The likeliest of both come first: tiles are ordered by cost already.
        return tuple(pairs)

    def tile_text(self) -> str:
        """The tiles of both."""
        return f"{self.first.tile_text()}+{self.second.tile_text()}"

    def problem(self) -> str:
        """The problems of both."""
        return f"{self.family} {self.first.problem()} {self.second.problem()}"

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights and bias of either, step operands, output."""
        second = self.second
        return (
            Parameter("x", self.first.input_shape()),
            Parameter("weight", self.first.weight_shape()),
            Parameter("bias", (self.first.filters,)),
            Parameter("last_weight", second.weight_shape()),
            Parameter("last_bias", (second.filters,)),
            *operand_parameters(second.steps, second.output_shape(), second.filters),
            Parameter("y", second.stored_shape()),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row."""
        x, weight, bias, last_weight, last_bias, *operands, y = buffers
        height = self.first.geometry.output_size[0]
        image, row = T.floordiv(item, height), T.floormod(item, height)
        scratch = local(self.scratch)
        with T.serial(0, self.first.filter_groups) as tile:
            _ToScratch(self.first, tile, image, (x, weight, bias, scratch)).emit_row(row)
        with T.serial(0, self.second.filter_groups) as tile:
            given = (scratch, last_weight, last_bias, *operands, y)
            _FromScratch(self.second, tile, image, given).emit_row(row)


class _ToScratch(RowEmitter):
    """Writes its row to scratch memory, ``[blocks, width, 16]``."""

    def _place(self, start: Expr, pixel: int, block: int) -> list[Expr]:
        channel_block = self.filter_tile * self.conv.tile.channel_blocks + block
        return [_at(channel_block, self.geometry.output_size[1], start + pixel)]


class _FromScratch(RowEmitter):
    """Reads its row from there."""

    def _input(
        self, input_block: Expr, tap_row: Expr, tap_column: Expr, pixel: Expr, channel: Expr
    ) -> Expr:
        return self.x[(input_block * self.geometry.size[1] + pixel) * LANES + channel]


def _at(block: Expr, width: int, pixel: Expr) -> Expr:
    return ramp((block * width + pixel) * LANES)


def _uncut(conv: Conv2d, registers: int) -> Iterator[Conv2d]:
    """Variants whose sums never wait in the output."""
    for variant in conv.variants(registers):
        if isinstance(variant, Conv2d) and not variant.tile.input_blocks:
            yield variant
