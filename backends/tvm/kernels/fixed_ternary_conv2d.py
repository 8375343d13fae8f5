"""Direct convolution of integers whose weights are ternary, packed two bits each.

The layouts are those of `fixed_conv2d`, but that the weights ``[O/NR, C/16, KH, KW, 4/G, NR, G]``
are bytes with the codes of four neighbouring groups. A work item is a tile of filters and a few
output rows. Its sums wait in a cache while one part of the input channels after the other is added
for all of its pixels; the weights of such a part are expanded once, and lie in the cache as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.conv_tiles import ConvTile, tile_options
from shohin.backends.tvm.kernels.dots import Inputs
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
    splat,
    store,
)
from shohin.backends.tvm.kernels.fixed_conv2d import FixedConv2d, RowEmitter
from shohin.backends.tvm.kernels.fixed_ternary import CODES, expand_by_lane, packed

_PIXELS = 48
"""Pixels of an item from which on expanding the weights takes a small part of its time."""

_POSITIONS = 9
"""Positions of a filter that are expanded together: of small filters, those of several blocks."""

_MOST_PIXELS = 256
_MOST_TAPS = 49
"""Sums of a row, and weights of a block, that are few enough for a cache, and for a stack."""


LONG_CHAIN = 12
"""Groups of inputs whose products have to fit 16 bits for sums of 16 bits to be worth it."""

FlushLevel: TypeAlias = Literal["pass", "block", "row", "never"]
"""The loop at the end of which sums of 16 bits are added to those of 32."""


@dataclass(frozen=True)
class FixedTernaryConv2d(FixedConv2d):
    """A convolution of integers with ternary weights; all channels of a block are in use.

    Attributes:
        scaled: whether sums are multiplied by a factor of their filter.
    """

    scaled: bool = False

    @property
    def family(self) -> str:
        """``fixed_ternary_conv2d``."""
        return "fixed_ternary_conv2d"

    @property
    def row_tiles(self) -> int:
        """Items along the rows of an image."""
        return ceil_div(self.geometry.output_size[0], self.tile.rows)

    @property
    def extent(self) -> int:
        """Filter tiles times images times tiles of rows."""
        return self.filter_groups * self.batch * self.row_tiles

    @property
    def block_words(self) -> int:
        """Groups of codes in a block of inputs."""
        return self.block_groups // CODES

    @property
    def blocks_at_once(self) -> int:
        """Input blocks whose weights are expanded together."""
        return min(self.group_blocks, max(1, _POSITIONS // self.taps))

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The convolution in every tile shape that fits the registers."""
        filter_blocks = self.filters // LANES // self.groups
        options = ternary_tile_options(self.geometry.output_size, filter_blocks, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Pixels times channel blocks, and rows."""
        return f"{self.tile.text()}x{self.tile.rows}r"

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the packed weights: tiles of filters, and everything else."""
        words = self.group_blocks * self.taps * self.block_words
        return (self.filter_groups, words * self.group_width)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, codes, what they stand for, factors if any, biases, step operands, output."""
        x, weight, *rest = super().parameters()
        names = ("pairs", "factors") if self.scaled else ("pairs",)
        rows = [Parameter(name, (self.filters,), "int32") for name in names]
        return (x, replace(weight, dtype="uint8"), *rows, *rest)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """A few output rows of a tile of filters."""
        filter_tile = T.floordiv(item, self.row_tiles * self.batch)
        image = T.floormod(T.floordiv(item, self.row_tiles), self.batch)
        first = T.floormod(item, self.row_tiles) * self.tile.rows
        _Emitter(self, filter_tile, image, first, buffers).emit()

    def pack(self, weight: Array) -> Array:
        """Codes ``[O, C/groups, KH, KW]`` as the kernel reads them."""
        tiles, blocks, size = self.filter_groups, self.group_blocks, self.unit.group
        nr, (rows, columns) = LANES * self.tile.channel_blocks, self.geometry.kernel
        full = np.zeros((tiles * nr, blocks * LANES, rows, columns), np.uint8)
        full[: weight.shape[0], : weight.shape[1]] = weight
        shape = (tiles, nr, blocks, self.block_words, CODES, size, rows, columns)
        ordered = full.reshape(shape).transpose(0, 2, 6, 7, 3, 4, 1, 5)
        return packed(ordered, 5).reshape(self.weight_shape())


class _Emitter(RowEmitter):
    """Emits an item: sums of all its pixels in memory, those of a few in registers."""

    conv: FixedTernaryConv2d

    def __init__(
        self,
        conv: FixedTernaryConv2d,
        filter_tile: Expr,
        image: Expr,
        first_row: Expr,
        buffers: tuple[Buffer, ...],
    ) -> None:
        x, weight, self.pairs, *rest = buffers
        self.factors = rest.pop(0) if conv.scaled else None
        super().__init__(conv, filter_tile, image, first_row, (x, weight, *rest))
        self.first_row, self.width = first_row, conv.geometry.output_size[1]
        self.filters = LANES * conv.tile.channel_blocks
        self.all_sums = local(conv.tile.rows * self.width * self.filters, "int32")
        taps = conv.blocks_at_once * conv.taps * conv.block_groups
        self.expanded = local(taps * conv.group_width, "int8")
        self.flush = _flush_level(conv)
        short = self.flush != "never"
        self.chain = 1 if short else min(conv.chain, conv.block_groups)

    def emit(self) -> None:
        """All sums, from zero to the results."""
        conv = self.conv
        zero = splat(T.int32(0))
        with T.serial(0, conv.tile.rows * self.width * conv.tile.channel_blocks) as index:
            store(self.all_sums, [ramp(index * LANES)], zero)
        passes, rest = divmod(conv.group_blocks, conv.blocks_at_once)
        with T.serial(0, passes) as number:
            self._pass(number * conv.blocks_at_once, conv.blocks_at_once)
        if rest:
            self._pass(passes * conv.blocks_at_once, rest)
        self._each_row(lambda: conv.geometry.for_each_tile(conv.tile.width, self._finish_tile))

    def _each_row(self, body: Callable[[], None]) -> None:
        height, rows = self.geometry.output_size[0], self.conv.tile.rows
        count = rows if height % rows == 0 else T.min(rows, height - self.first_row)
        with T.serial(0, count) as row:
            self.row, self.own_row = self.first_row + row, row
            body()

    def _pass(self, first: Expr, count: int) -> None:
        """Add what a few blocks of inputs contribute to all sums."""
        conv = self.conv
        words = conv.taps * conv.block_words
        with T.serial(0, count * words) as word:
            for piece in range(self.pieces):
                self._expand(first * words + word, word, piece)

        def tile(start: Expr, width: int, position: int | None) -> None:
            self._add_tile((first, count), start, width, position)

        self._each_row(lambda: conv.geometry.for_each_tile(conv.tile.width, tile))

    def _expand(self, source: Expr, target: Expr, piece: int) -> None:
        """Expand a register of codes to four of weights."""
        conv, unit = self.conv, self.conv.unit
        before = conv.group_width
        codes = self.weight[
            self.filter_tile, ramp(source * before + piece * unit.width, unit.width)
        ]
        row = self.filter_tile * self.filters + piece * unit.lanes
        pairs, codes = T.bind(self.pairs[ramp(row, unit.lanes)]), T.bind(codes)
        for place in range(CODES):
            start = (target * CODES + place) * before + piece * unit.width
            weights = expand_by_lane(unit, pairs, codes, place)
            store(self.expanded, [ramp(start, unit.width)], weights)

    def _add_tile(
        self, part: tuple[Expr, int], start: Expr, width: int, position: int | None
    ) -> None:
        """Add what blocks of inputs contribute to the sums of a few pixels."""
        first, count = part
        sums = _TileSums(self, start, width)
        sums.begin("pass")
        with T.serial(0, count) as block:
            self.own_block = block
            sums.begin("block")
            low, high = self.geometry.tap_rows(self.row)
            with T.serial(low, high) as tap_row:
                sums.begin("row")
                self._columns(sums.numbers, first + block, tap_row, start, width, position)
                sums.end("row")
            sums.end("block")
        sums.end("pass")

    def _groups(
        self,
        sums: Buffer,
        block: Expr,
        tap_row: Expr,
        tap: Expr,
        start: Expr,
        pixels: Sequence[int],
    ) -> None:
        if self.chain > 1:
            super()._groups(sums, block, tap_row, tap, start, pixels)
            return
        # A number of groups that LLVM does not know: where it unrolls the loop, it adds products of
        # several groups before it adds them to the sums, and runs out of registers.
        with T.serial(0, self.groups + T.min(self.filter_tile, 0)) as group:
            pieces = range(self.pieces)
            weights = [self._weights(block, tap_row, tap, group, piece) for piece in pieces]
            for pixel in pixels:
                given = self._inputs(block, tap_row, tap, start + pixel, group)
                for piece in pieces:
                    self._add(sums, pixel, piece, [given], [weights[piece]])

    def _weights(self, block: Expr, tap_row: Expr, tap: Expr, group: Expr, piece: int) -> Expr:
        conv, width = self.conv, self.conv.unit.width
        place = self.own_block * conv.taps + tap_row * self.geometry.kernel[1] + tap
        start = (place * self.groups + group) * conv.group_width + piece * width
        return T.bind(self.expanded[ramp(start, width)])

    def _add(
        self, sums: Buffer, pixel: int, piece: int, inputs: list[Inputs], weights: list[Expr]
    ) -> None:
        if self.flush == "never":
            super()._add(sums, pixel, piece, inputs, weights)
            return
        unit = self.conv.unit
        lane = ramp((pixel * self.pieces + piece) * 2 * unit.lanes, 2 * unit.lanes)
        store(sums, [lane], sums[lane] + unit.products(inputs[0], weights[0]))

    def sums_of(self, pixel: Expr, lane: int, lanes: int) -> Expr:
        """Where some of the sums of a pixel of the current row are."""
        return ramp((self.own_row * self.width + pixel) * self.filters + lane, lanes)

    def _finish_tile(self, start: Expr, width: int, position: int | None) -> None:
        """The results of a few pixels."""
        count = self.conv.tile.channel_blocks
        totals = local(width * self.filters, "int32")
        for pixel in range(width):
            for block in range(count):
                found = self.all_sums[self.sums_of(start + pixel, block * LANES, LANES)]
                if self.factors is not None:
                    channel = self.filter_tile * self.filters + block * LANES
                    found = found * self.factors[ramp(channel)]
                place = ramp((pixel * count + block) * LANES)
                store(totals, [place], found + self._start(pixel, block, position))
                self._finish(totals, start, pixel, block)


class _TileSums:
    """Sums of a few pixels in registers, of 32 bits, or of 16 that are added to others in time."""

    def __init__(self, emitter: _Emitter, start: Expr, width: int) -> None:
        self._emitter, self._start = emitter, start
        self._unit = emitter.conv.unit
        self._pieces = [(p, q) for p in range(width) for q in range(emitter.pieces)]
        self._short = emitter.flush != "never"
        self._lanes = (2 if self._short else 1) * self._unit.lanes
        size = len(self._pieces) * self._lanes
        self.numbers = local(size, "int16" if self._short else "int32")

    def begin(self, level: FlushLevel) -> None:
        """Enter a loop of that level."""
        if not self._short and level == "pass":
            for index, piece in enumerate(self._pieces):
                store(self.numbers, [self._at(index)], self._memory(piece))
        if level == self._emitter.flush:
            for index in range(len(self._pieces)):
                store(self.numbers, [self._at(index)], splat(T.int16(0), self._lanes))

    def end(self, level: FlushLevel) -> None:
        """Leave a loop of that level."""
        for index, piece in enumerate(self._pieces):
            held = self.numbers[self._at(index)]
            if not self._short and level == "pass":
                store(self._emitter.all_sums, [self._place(piece)], held)
            if level == self._emitter.flush:
                total = self._memory(piece) + self._unit.widen(held)
                store(self._emitter.all_sums, [self._place(piece)], total)

    def _memory(self, piece: tuple[int, int]) -> Expr:
        return self._emitter.all_sums[self._place(piece)]

    def _place(self, piece: tuple[int, int]) -> Expr:
        pixel, number = piece
        lanes = self._unit.lanes
        return self._emitter.sums_of(self._start + pixel, number * lanes, lanes)

    def _at(self, index: int) -> Expr:
        return ramp(index * self._lanes, self._lanes)


def _flush_level(conv: FixedTernaryConv2d) -> FlushLevel:
    """The outermost loop whose products 16 bits hold; ``never`` where that is not worth it."""
    taps, columns = conv.taps, conv.geometry.kernel[1]
    sizes: dict[FlushLevel, int] = {
        "pass": conv.blocks_at_once * taps * conv.block_groups,
        "block": taps * conv.block_groups,
        "row": columns * conv.block_groups,
    }
    fitting = [level for level, size in sizes.items() if conv.unit.chains and size <= conv.chain]
    least = LONG_CHAIN * conv.block_groups // CODES
    return next((level for level in fitting if sizes[level] >= least), "never")


def ternary_tile_options(
    output_size: tuple[int, int], filter_blocks: int, registers: int
) -> list[ConvTile]:
    """Tiles whose sums and weights fit the registers, cheapest first by the cost model.

    Args:
        output_size: rows and pixels of a row.
        filter_blocks: whole blocks of filters of a group.
        registers: vectors of 16 sums that registers hold.
    """
    height, width = output_size
    most = ceil_div(height, max(1, ceil_div(height * width, _PIXELS)))
    rows = ceil_div(height, ceil_div(height, most))
    options = tile_options(width, filter_blocks, registers, 2)
    return [replace(tile, rows=rows) for tile in options]


def fits(conv: FixedConv2d) -> bool:
    """Whether there is such a kernel instead of one for bytes."""
    whole = conv.last_channels in (0, LANES) or conv.group_blocks > 1
    small = conv.geometry.output_size[1] <= _MOST_PIXELS and conv.taps <= _MOST_TAPS
    return conv.unit.looks_up and not conv.wide and whole and small
