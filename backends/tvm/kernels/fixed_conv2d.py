"""Direct convolution of integers: blocked channels in and out.

Layouts: input ``[N, C/16, H, W, 16]``, weights ``[O/NR, C/16, KH, KW, 16/G, NR * G]`` with groups
of G neighbouring inputs beside each other, output ``[N, O/16, OH, OW, 16]``. The last block of
inputs has weights for as many groups as its channels need. Work items and tiles are those of
`conv2d`; sums have 32 bits, or 64 where 32 might not do, and are rescaled before they are stored.

Where the unit raises its inputs, the bias takes off again what that adds; at the border, where taps
are left out, it is another amount, so there is a bias for each set of taps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.conv_tiles import ConvTile, tile_options
from shohin.backends.tvm.kernels.dots import RAISED, DotUnit, Inputs, widened
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    local,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry


@dataclass(frozen=True)
class FixedConv2d(Kernel):
    """A convolution of integers with fused steps, the first of which rescales the sums.

    Attributes:
        batch: images.
        channels: input channels, all groups together, a multiple of 16.
        filters: output channels in whole blocks, all groups together.
        geometry: sizes, stride, padding.
        groups: both channels per group are whole blocks where this is not 1.
        unit: the instructions.
        signed: whether an input may be negative.
        result: element type of the output.
        tile: how the work is cut.
        chain: groups of inputs whose products are added in 16 bits.
        wide: whether sums have 64 bits.
        source: element type of the inputs, which the unit may want wider.
        weight_type: element type of the packed weights.
        steps: on the sums.
        output_blocks: blocks of channels from one output image to the next; 0 for those computed.
        last_channels: channels in use of the last input block, the others have no weights; 0 for
            all 16.
    """

    batch: int
    channels: int
    filters: int
    geometry: Geometry
    groups: int
    unit: DotUnit
    signed: bool
    result: str
    tile: ConvTile
    chain: int = 1
    wide: bool = False
    source: str = "int8"
    weight_type: str = "int8"
    steps: tuple[Step, ...] = ()
    output_blocks: int = 0
    last_channels: int = 0

    tiling = frozenset({"tile"})

    @property
    def family(self) -> str:
        """``fixed_conv2d``."""
        return "fixed_conv2d"

    @property
    def filter_groups(self) -> int:
        """Number of tiles of filters."""
        return self.filters // (LANES * self.tile.channel_blocks)

    @property
    def extent(self) -> int:
        """Filter tiles times images times output rows."""
        return self.filter_groups * self.batch * self.geometry.output_size[0]

    @property
    def group_blocks(self) -> int:
        """Input blocks that one filter reads."""
        return self.channels // LANES // self.groups

    @property
    def block_groups(self) -> int:
        """Groups of inputs in a block."""
        return LANES // self.unit.group

    @property
    def last_groups(self) -> int:
        """Groups of inputs in the last block."""
        return -(-(self.last_channels or LANES) // self.unit.group)

    @property
    def taps(self) -> int:
        """Positions of a filter."""
        return self.geometry.kernel[0] * self.geometry.kernel[1]

    @property
    def input_groups(self) -> int:
        """Groups of inputs that one filter reads at a position."""
        return (self.group_blocks - 1) * self.block_groups + self.last_groups

    @property
    def operations(self) -> int:
        """Multiply-accumulates by four: the products of a group are one operation."""
        height, width = self.geometry.output_size
        products = self.input_groups * self.unit.group * self.taps
        return self.batch * self.filters * height * width * products // 4

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The convolution in every tile shape that fits the registers."""
        filter_blocks = self.filters // LANES // self.groups
        options = tile_options(self.geometry.output_size[1], filter_blocks, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Pixels times channel blocks."""
        return self.tile.text()

    @property
    def group_width(self) -> int:
        """Weights of a group of inputs, for a tile of filters."""
        return LANES * self.tile.channel_blocks * self.unit.group

    def weight_shape(self) -> tuple[int, int]:
        """Shape of the packed weights: tiles of filters, and everything else."""
        return (self.filter_groups, self.taps * self.input_groups * self.group_width)

    @cached_property
    def row_runs(self) -> tuple[int, ...]:
        """Output rows at which another set of taps is inside the image than in the row before."""
        return _runs(self.geometry, 0) if self.unit.raises(self.signed) else (0,)

    @cached_property
    def column_runs(self) -> tuple[int, ...]:
        """The same for columns."""
        return _runs(self.geometry, 1) if self.unit.raises(self.signed) else (0,)

    def bias_shape(self) -> tuple[int, int, int]:
        """Biases for each set of rows and columns of taps inside the image."""
        return (len(self.row_runs), len(self.column_runs), self.filters)

    @property
    def sum_type(self) -> str:
        """Element type of the sums."""
        return "int64" if self.wide else "int32"

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, biases, step operands, output."""
        blocks = self.channels // LANES
        stored = self.output_blocks or self.filters // LANES
        result = (self.batch, stored, *self.geometry.output_size, LANES)
        full = (self.batch, self.filters // LANES, *self.geometry.output_size, LANES)
        return (
            Parameter("x", (self.batch, blocks, *self.geometry.size, LANES), self.source),
            Parameter("weight", self.weight_shape(), self.weight_type),
            Parameter("bias", self.bias_shape(), self.sum_type),
            *operand_parameters(self.steps, full, self.filters),
            Parameter("y", result, self.result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row of a tile of filters."""
        height = self.geometry.output_size[0]
        filter_tile = T.floordiv(item, height * self.batch)
        image = T.floormod(T.floordiv(item, height), self.batch)
        row = T.floormod(item, height)
        emitter = RowEmitter(self, filter_tile, image, row, buffers)
        self.geometry.for_each_tile(self.tile.width, emitter.emit_tile)

    def pack(self, weight: Array) -> Array:
        """``[O, C/groups, KH, KW]`` integers as the kernel reads them, zeros where ragged."""
        tiles, blocks, (rows, columns) = self.filter_groups, self.group_blocks, self.geometry.kernel
        nr, size = LANES * self.tile.channel_blocks, self.unit.group
        full = np.zeros((tiles * nr, blocks * LANES, rows, columns), self.weight_type)
        full[: weight.shape[0], : weight.shape[1]] = weight
        split = full.reshape(tiles, nr, blocks, self.block_groups, size, rows, columns)
        ordered = split.transpose(0, 2, 5, 6, 3, 1, 4)
        whole, last = ordered[:, :-1], ordered[:, -1, :, :, : self.last_groups]
        parts = [part.reshape(tiles, math.prod(part.shape[1:])) for part in (whole, last)]
        return np.concatenate(parts, 1)

    def biases(self, weight: Array, bias: Array) -> Array:
        """Biases for each set of taps.

        Args:
            weight: integers ``[O, C/groups, KH, KW]``.
            bias: integers ``[O]``.
        """
        found = np.zeros(self.bias_shape(), self.sum_type)
        found[:, :, : bias.size] = bias
        if self.unit.raises(self.signed):
            sums = weight.astype(np.int64).sum(1)
            for r, row in enumerate(self.row_runs):
                for c, column in enumerate(self.column_runs):
                    inside = np.ix_(
                        np.arange(len(sums)),
                        np.array(_inside(self.geometry, 0, row), np.int64),
                        np.array(_inside(self.geometry, 1, column), np.int64),
                    )
                    found[r, c, : len(sums)] -= RAISED * sums[inside].sum((1, 2))
        return found


class RowEmitter:
    """Emits one output row; holds what its tiles share."""

    def __init__(
        self,
        conv: FixedConv2d,
        filter_tile: Expr,
        image: Expr,
        row: Expr,
        buffers: tuple[Buffer, ...],
    ) -> None:
        self.conv = conv
        self.geometry = conv.geometry
        self.x, self.weight, self.bias, *self.operands, self.y = buffers
        self.filter_tile, self.image, self.row = filter_tile, image, row
        self.groups, self.chain = conv.block_groups, conv.chain
        self.pieces = conv.tile.channel_blocks * LANES // conv.unit.lanes

    def emit_tile(self, start: Expr, width: int, position: int | None) -> None:
        """Emit `width` pixels from `start`; `position` is `start` where it is known, else None."""
        conv = self.conv
        sums = local(width * conv.tile.channel_blocks * LANES, conv.sum_type)
        for pixel in range(width):
            for block in range(conv.tile.channel_blocks):
                lane = _block_lane(pixel, block, conv.tile.channel_blocks)
                store(sums, [lane], self._start(pixel, block, position))
        whole = conv.group_blocks
        if conv.last_groups < conv.block_groups:
            whole -= 1
        with T.serial(0, whole) as block:
            self._block(sums, block, start, width, position)
        if whole < conv.group_blocks:
            self.groups = conv.last_groups
            self._block(sums, whole, start, width, position)
            self.groups = conv.block_groups
        for pixel in range(width):
            for block in range(conv.tile.channel_blocks):
                self._finish(sums, start, pixel, block)

    def _block(
        self, sums: Buffer, block: Expr, start: Expr, width: int, position: int | None
    ) -> None:
        """Add what a block of inputs contributes."""
        low, high = self.geometry.tap_rows(self.row)
        with T.serial(low, high) as tap_row:
            self._columns(sums, block, tap_row, start, width, position)

    def _start(self, pixel: int, block: int, position: int | None) -> Expr:
        """The bias of the taps that are inside of the image at a pixel."""
        conv = self.conv
        row: Expr = 0
        for first in conv.row_runs[1:]:
            row = row + T.cast(self.row >= first, "int32")
        column = _run_of(conv.column_runs, position + pixel) if position is not None else None
        if column is None:
            column = _run_of(conv.column_runs, _middle(self.geometry))
        channel = (self.filter_tile * conv.tile.channel_blocks + block) * LANES
        return self.bias[row, column, ramp(channel)]

    def _columns(
        self,
        sums: Buffer,
        block: Expr,
        tap_row: Expr,
        start: Expr,
        width: int,
        position: int | None,
    ) -> None:
        taps = self.geometry.kernel[1]
        if position is None:
            with T.serial(0, taps) as tap:
                self._groups(sums, block, tap_row, tap, start, range(width))
            return
        for tap in range(taps):
            inside = [p for p in range(width) if self.geometry.has_column(position + p, tap)]
            if inside:
                self._groups(sums, block, tap_row, tap, start, inside)

    def _groups(
        self,
        sums: Buffer,
        block: Expr,
        tap_row: Expr,
        tap: Expr,
        start: Expr,
        pixels: Sequence[int],
    ) -> None:
        for first in range(0, self.groups, self.chain):
            groups = range(first, min(first + self.chain, self.groups))
            inputs = {
                (pixel, group): self._inputs(block, tap_row, tap, start + pixel, group)
                for pixel in pixels
                for group in groups
            }
            for piece in range(self.pieces):
                weights = [self._weights(block, tap_row, tap, group, piece) for group in groups]
                for pixel in pixels:
                    given = [inputs[pixel, group] for group in groups]
                    self._add(sums, pixel, piece, given, weights)

    def _add(
        self, sums: Buffer, pixel: int, piece: int, inputs: list[Inputs], weights: list[Expr]
    ) -> None:
        conv, unit = self.conv, self.conv.unit
        lane = ramp((pixel * self.pieces + piece) * unit.lanes, unit.lanes)
        if conv.wide:
            found = unit.pair_sums(inputs[0], weights[0])
            store(sums, [lane], sums[lane] + T.cast(found, f"int64x{unit.lanes}"))
        elif len(inputs) == 1:
            store(sums, [lane], unit.add(sums[lane], inputs[0], weights[0]))
        else:
            products = unit.products(inputs[0], weights[0])
            for given, weight in zip(inputs[1:], weights[1:], strict=True):
                products = products + unit.products(given, weight)
            store(sums, [lane], sums[lane] + unit.widen(products))

    def _inputs(self, block: Expr, tap_row: Expr, tap: Expr, pixel: Expr, group: int) -> Inputs:
        conv = self.conv
        row, column = self.geometry.row(self.row, tap_row), self.geometry.column(pixel, tap)
        if conv.groups > 1:
            tiles_per_group = conv.filter_groups // conv.groups
            block = T.floordiv(self.filter_tile, tiles_per_group) * conv.group_blocks + block
        place = ramp(group * conv.unit.group, conv.unit.group)
        read = self.x[self.image, block, row, column, place]
        return conv.unit.inputs(widened(read, conv.source, conv.unit.input_type), conv.signed)

    def _weights(self, block: Expr, tap_row: Expr, tap: Expr, group: int, piece: int) -> Expr:
        conv, unit = self.conv, self.conv.unit
        size, columns = unit.lanes * unit.group, self.geometry.kernel[1]
        place = (tap_row * columns + tap) * self.groups + group
        place = block * conv.taps * conv.block_groups + place
        read = self.weight[self.filter_tile, ramp(place * conv.group_width + piece * size, size)]
        return T.bind(widened(read, self.conv.weight_type, unit.input_type))

    def _finish(self, sums: Buffer, start: Expr, pixel: int, block: int) -> None:
        conv = self.conv
        count = conv.tile.channel_blocks
        channel_block = self.filter_tile * count + block
        place = [self.image, channel_block, self.row, start + pixel, ramp(0)]
        result = apply_steps(
            conv.steps,
            sums[_block_lane(pixel, block, count)],
            tuple(self.operands),
            _reader(place),
            _reader([ramp(channel_block * LANES)]),
        )
        if conv.result != "float32":
            result = T.cast(result, f"{conv.result}x{LANES}")
        store(self.y, place, result)


def _reader(place: list[Expr]) -> Callable[[Buffer], Expr]:
    return lambda buffer: buffer[tuple(place)]


def _block_lane(pixel: int, block: int, count: int) -> Expr:
    return ramp((pixel * count + block) * LANES)


def _inside(geometry: Geometry, axis: int, position: int) -> list[int]:
    """Taps along an axis that are inside of the image at an output position."""
    step, before = geometry.stride[axis], geometry.padding[2 * axis]
    first = position * step - before
    taps = range(geometry.kernel[axis])
    return [t for t in taps if 0 <= first + t * geometry.dilation[axis] < geometry.size[axis]]


def _runs(geometry: Geometry, axis: int) -> tuple[int, ...]:
    """Output positions at which other taps are inside of the image than one before."""
    length = geometry.output_size[axis]
    sets = [_inside(geometry, axis, position) for position in range(length)]
    return tuple(i for i in range(length) if i == 0 or sets[i] != sets[i - 1])


def _run_of(runs: tuple[int, ...], position: int) -> int:
    return sum(first <= position for first in runs) - 1


def _middle(geometry: Geometry) -> int:
    """An output column all of whose taps are inside of the image; the first if there is none."""
    taps = geometry.kernel[1]
    columns = range(geometry.output_size[1])
    return next((c for c in columns if len(_inside(geometry, 1, c)) == taps), 0)


def conv_chain(unit: DotUnit, weight: Array, signed: bool) -> int:
    """Groups of inputs of a block whose products 16 bits hold, for every filter and tap.

    Args:
        unit: the instructions.
        weight: integers ``[O, C/groups, KH, KW]``.
        signed: whether an input may be negative.
    """
    if not unit.chains:
        return 1
    filters, channels, rows, columns = weight.shape
    full = np.zeros((filters, blocks(channels) * LANES, rows, columns), weight.dtype)
    full[:, :channels] = weight
    split = full.reshape(filters, -1, LANES, rows, columns).transpose(0, 1, 3, 4, 2)
    return chain_length(split, unit.group, signed)


def chain_length(weights: Array, group: int, signed: bool) -> int:
    """Most groups of inputs, 1, 2 or 4, whose products can be added in 16 bits.

    Args:
        weights: integers ``[..., 16]``, the last axis the inputs of a block in order.
        group: neighbouring inputs of a lane; every two are a 16-bit sum.
        signed: whether an input may be negative.
    """
    largest_input = 128 if signed else 127
    pairs = weights.astype(np.int64).reshape(-1, LANES // group, group // 2, 2)
    above, below = pairs.clip(min=0).sum(-1), (-pairs).clip(min=0).sum(-1)
    for length in (4, 2):
        if length > pairs.shape[1]:
            continue
        shape = (len(pairs), pairs.shape[1] // length, length, -1)
        sums = [part.reshape(shape).sum(2) for part in (above, below)]
        worst = sums[0] + sums[1] if signed else np.maximum(sums[0], sums[1])
        if worst.size == 0 or int(worst.max()) * largest_input <= np.iinfo(np.int16).max:
            return length
    return 1
