"""Direct convolution with ternary weights, kept as two bits a weight.

The same as `Conv2d` but for where weights come from: a work item expands those of its filters and
of a few input channels from their codes to a scratch of some kilobytes, which a cache near the
processor keeps, and computes all of its output rows with them. So weights are expanded once for
hundreds of pixels, and sixteen times fewer bytes come from memory.
"""

from dataclasses import dataclass, replace

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.conv2d import Conv2d, RowEmitter
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, tile_options
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    ceil_div,
    local,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.ternary_codes import (
    CODES_A_WORD,
    MOST_SCRATCH,
    VALUES,
    decoded,
    load_words,
    pack_codes,
)

_SCRATCH = 20_000
"""Bytes of expanded weights that a tile aims at, to leave room in a first level cache."""


@dataclass(frozen=True)
class PackedConv2d(Conv2d):
    """A convolution whose filters have two values each.

    Codes are packed ``[O/NR, C/16, words, NR]``: sixteen of the places ``[KH, KW, 16]`` to a word.

    Attributes:
        items: work items that there should be at least, for threads to share.
    """

    items: int = 1

    @property
    def family(self) -> str:
        """``packed_conv2d``."""
        return "packed_conv2d"

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The convolution in every tile shape that fits the registers and the stack."""
        filter_blocks = self.filters // LANES // self.groups
        options = tile_options(self.geometry.output_size[1], filter_blocks, registers)
        return tuple(
            replace(self, tile=self._cut(tile))
            for tile in options
            if self._block_bytes(tile) <= MOST_SCRATCH
        )

    def _cut(self, tile: ConvTile) -> ConvTile:
        """A tile with as many input blocks as a scratch holds, and as many rows as items allow."""
        height = self.geometry.output_size[0]
        parts = ceil_div(self.group_blocks, max(1, _SCRATCH // self._block_bytes(tile)))
        filter_groups = self.filters // (LANES * tile.channel_blocks)
        cuts = min(height, ceil_div(self.items, filter_groups * self.batch))
        return replace(tile, rows=height // cuts, input_blocks=ceil_div(self.group_blocks, parts))

    def _block_bytes(self, tile: ConvTile) -> int:
        """Bytes of the expanded weights of an input block."""
        return 4 * LANES * tile.channel_blocks * self.words * CODES_A_WORD

    @property
    def places(self) -> int:
        """Weights of a filter and an input block."""
        return self.geometry.kernel[0] * self.geometry.kernel[1] * self.inner_channels

    @property
    def words(self) -> int:
        """Words of a filter and an input block."""
        return ceil_div(self.places, CODES_A_WORD)

    @property
    def tile_filters(self) -> int:
        """Filters of a work item."""
        return LANES * self.tile.channel_blocks

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of the bytes of the words."""
        return (self.filter_groups, self.group_blocks, self.words, 4 * self.tile_filters)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, words of codes, both values of each filter, bias, step operands, output."""
        x, _, *rest = super().parameters()
        return (
            x,
            Parameter("codes", self.code_shape, "uint8"),
            Parameter("values", (VALUES, self.filters)),
            *rest,
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The rows of one work item, for one part of the input blocks after the other."""
        x, codes, values, *rest = buffers
        filter_tile = T.floordiv(item, self.row_groups * self.batch)
        image = T.floormod(T.floordiv(item, self.row_groups), self.batch)
        first = T.floormod(item, self.row_groups) * self.tile.rows
        last = T.min(first + self.tile.rows, self.geometry.output_size[0])
        length = self.tile.input_blocks
        scratch = local(length * self.words * CODES_A_WORD * self.tile_filters)
        emitter = _PackedEmitter(self, filter_tile, image, (x, scratch, *rest))
        parts = ceil_div(self.group_blocks, length)
        with T.serial(0, parts) as part:
            emitter.expand(codes, values, part)
            with T.serial(0, last - first) as row:
                emitter.emit_row(first + row, part, parts)

    def pack(self, codes: Array) -> Array:
        """``[O, C/groups, KH, KW]`` codes as words, 0 where ragged."""
        tiles, input_blocks, rows, columns, lanes, nr = self.weight_shape()
        full = np.zeros((tiles * nr, input_blocks * lanes, rows, columns), np.int8)
        full[: codes.shape[0], : codes.shape[1]] = codes
        split = full.reshape(tiles, nr, input_blocks, lanes, rows, columns)
        return pack_codes(split.transpose(0, 2, 4, 5, 3, 1).reshape(tiles, input_blocks, -1, nr))


class _PackedEmitter(RowEmitter):
    """Takes weights from a scratch, which it fills."""

    conv: PackedConv2d

    def expand(self, codes: Buffer, values: Buffer, part: Expr) -> None:
        """Write the weights of a part of the input blocks to the scratch."""
        conv, length = self.conv, self.conv.tile.input_blocks
        count = T.min(length, conv.group_blocks - part * length)
        with T.serial(0, count) as index, T.serial(0, conv.words) as word:
            for block in range(conv.tile.channel_blocks):
                place = [self.filter_tile, part * length + index, word]
                words = load_words(codes, place, block)
                filters = ramp(self.filter_tile * conv.tile_filters + block * LANES)
                pair = [values[number, filters] for number in range(VALUES)]
                for code in range(CODES_A_WORD):
                    at = self._at(index, word * CODES_A_WORD + code, block)
                    store(self.weight, [at], decoded(words, code, pair))

    def _weights(
        self, input_block: Expr, tap: tuple[Expr, Expr], channel: Expr, block: int
    ) -> Expr:
        conv = self.conv
        index = input_block - self.part * conv.tile.input_blocks
        place = (tap[0] * conv.geometry.kernel[1] + tap[1]) * conv.inner_channels + channel
        return self.weight[self._at(index, place, block)]

    def _at(self, index: Expr, place: Expr, block: int) -> Expr:
        """Where a block of filters has the weight of a place in an input block of this part."""
        conv = self.conv
        first = (index * conv.words * CODES_A_WORD + place) * conv.tile_filters
        return ramp(first + block * LANES)
