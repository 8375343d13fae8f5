"""Direct convolution: blocked channels out, blocked or plain channels in.

Layouts: input ``[N, C/16, H, W, 16]`` or plain ``[N, C, H, W]`` (few channels), weights
``[O/NR, C/16, KH, KW, 16, NR]``, output ``[N, O/16, OH, OW, 16]``. One work item is one output
row of one block of NR channels, or a few rows where weights are cut to fit a cache. A row is cut in
tiles whose sums fill the registers.
Tiles that touch the left or right border are emitted with their position known, so that taps
outside the image are left out when the code is made: there is no padded copy of the input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import either
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, cache_blocked, tile_options
from shohin.backends.tvm.kernels.emit import (
    LANES,
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
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry


@dataclass(frozen=True)
class Conv2d(Kernel):
    """A convolution with fused bias and element-wise steps.

    Attributes:
        batch: images.
        channels: input channels, all groups together; a multiple of 16 unless `plain_input`.
        filters: output channels in whole blocks, all groups together.
        geometry: sizes, stride, padding.
        groups: both channels per group are whole blocks where this is not 1.
        plain_input: whether the input is plain NCHW.
        tile: how the work is cut.
        steps: element-wise steps on the result.
        output_blocks: blocks of channels from one output image to the next; 0 for those computed.
        last_channels: channels in use of the last input block, the others have no weights; 0 for
            all 16.
    """

    batch: int
    channels: int
    filters: int
    geometry: Geometry
    groups: int
    plain_input: bool
    tile: ConvTile
    steps: tuple[Step, ...] = ()
    output_blocks: int = 0
    last_channels: int = 0

    tiling = frozenset({"tile"})

    @property
    def family(self) -> str:
        """``conv2d``."""
        return "conv2d"

    @property
    def filter_groups(self) -> int:
        """Number of tiles of filters."""
        return self.filters // (LANES * self.tile.channel_blocks)

    @property
    def extent(self) -> int:
        """Filter tiles times images times groups of output rows."""
        return self.filter_groups * self.batch * self.row_groups

    @property
    def row_groups(self) -> int:
        """Work items of an image and a filter tile."""
        return ceil_div(self.geometry.output_size[0], self.tile.rows)

    @property
    def inner_channels(self) -> int:
        """Channels in one input block."""
        return self.channels if self.plain_input else LANES

    @property
    def group_blocks(self) -> int:
        """Input blocks that one filter reads."""
        return 1 if self.plain_input else self.channels // LANES // self.groups

    @property
    def operations(self) -> int:
        """Multiply-accumulates."""
        height, width = self.geometry.output_size
        rows, columns = self.geometry.kernel
        unused = LANES - self.last_channels if self.last_channels else 0
        taps = (self.group_blocks * self.inner_channels - unused) * rows * columns
        return self.batch * self.filters * height * width * taps

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The convolution in every tile shape that fits the registers."""
        filter_blocks = self.filters // LANES // self.groups
        height, width = self.geometry.output_size
        taps = self.geometry.kernel[0] * self.geometry.kernel[1]
        options = tile_options(width, filter_blocks, registers)
        if not self.plain_input:
            options = cache_blocked(options, height, self.group_blocks, taps)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Pixels times channel blocks, and cache blocking."""
        return self.tile.text()

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        nr = LANES * self.tile.channel_blocks
        kernel = self.geometry.kernel
        return (self.filter_groups, self.group_blocks, *kernel, self.inner_channels, nr)

    def input_shape(self) -> tuple[int, ...]:
        """Physical shape of the input."""
        if self.plain_input:
            return (self.batch, self.channels, *self.geometry.size)
        return (self.batch, self.channels // LANES, *self.geometry.size, LANES)

    def output_shape(self) -> tuple[int, ...]:
        """Physical shape of the output."""
        return (self.batch, self.filters // LANES, *self.geometry.output_size, LANES)

    def stored_shape(self) -> tuple[int, ...]:
        """Physical shape of the array that the output is a part of."""
        count = self.output_blocks or self.filters // LANES
        return (self.batch, count, *self.geometry.output_size, LANES)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, bias, step operands, output."""
        return (
            Parameter("x", self.input_shape()),
            Parameter("weight", self.weight_shape()),
            Parameter("bias", (self.filters,)),
            *operand_parameters(self.steps, self.output_shape(), self.filters),
            Parameter("y", self.stored_shape()),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The rows of one work item."""
        filter_tile = T.floordiv(item, self.row_groups * self.batch)
        image = T.floormod(T.floordiv(item, self.row_groups), self.batch)
        group = T.floormod(item, self.row_groups)
        emitter = RowEmitter(self, filter_tile, image, buffers)
        if not self.tile.input_blocks:
            emitter.emit_row(group)
            return
        parts = ceil_div(self.group_blocks, self.tile.input_blocks)
        first = group * self.tile.rows
        last = T.min(first + self.tile.rows, self.geometry.output_size[0])
        with T.serial(0, parts) as part, T.serial(0, last - first) as row:
            emitter.emit_row(first + row, part, parts)


class RowEmitter:
    """Emits one output row; holds what its tiles share."""

    def __init__(
        self, conv: Conv2d, filter_tile: Expr, image: Expr, buffers: tuple[Buffer, ...]
    ) -> None:
        self.conv = conv
        self.geometry = conv.geometry
        self.x, self.weight, self.bias, *self.operands, self.y = buffers
        self.filter_tile = filter_tile
        self.image = image
        self.row: Expr = 0
        self.part: Expr = 0
        self.parts = 1

    def emit_row(self, row: Expr, part: Expr = 0, parts: int = 1) -> None:
        """Emit one row, summed over one part of the input blocks."""
        self.row, self.part, self.parts = row, part, parts
        self.geometry.for_each_tile(self.conv.tile.width, self._emit_tile)

    def _emit_tile(self, start: Expr, width: int, position: int | None) -> None:
        """Emit `width` pixels from `start`; `position` is `start` where it is known, else None."""
        count = self.conv.tile.channel_blocks
        sums = local(width * count * LANES)
        places = [(pixel, block) for pixel in range(width) for block in range(count)]

        def start_from_bias() -> None:
            for pixel, block in places:
                channel = (self.filter_tile * count + block) * LANES
                store(sums, [_lane(pixel, block, count)], self.bias[ramp(channel)])

        def go_on() -> None:
            for pixel, block in places:
                waiting = self.y[tuple(self._place(start, pixel, block))]
                store(sums, [_lane(pixel, block, count)], waiting)

        def wait() -> None:
            for pixel, block in places:
                store(self.y, self._place(start, pixel, block), sums[_lane(pixel, block, count)])

        def finish() -> None:
            for pixel, block in places:
                self._store(sums, start, pixel, block)

        either(self.part == 0, start_from_bias, go_on)
        self._sum(sums, start, width, position)
        either(self.part == self.parts - 1, finish, wait)

    def _sum(self, sums: Buffer, start: Expr, width: int, position: int | None) -> None:
        length = self.conv.tile.input_blocks or self.conv.group_blocks
        first = self.part * length
        last = T.min(first + length, self.conv.group_blocks) if self.parts > 1 else length
        with T.serial(0, last - first) as index:
            low, high = self.geometry.tap_rows(self.row)
            with T.serial(low, high) as tap_row:
                self._columns(sums, first + index, tap_row, start, width, position)

    def _columns(
        self,
        sums: Buffer,
        input_block: Expr,
        tap_row: Expr,
        start: Expr,
        width: int,
        position: int | None,
    ) -> None:
        taps = self.geometry.kernel[1]
        if position is None:
            with T.serial(0, taps) as tap:
                self._channels(sums, input_block, tap_row, tap, start, range(width))
            return
        for tap in range(taps):
            inside = [p for p in range(width) if self.geometry.has_column(position + p, tap)]
            if inside:
                self._channels(sums, input_block, tap_row, tap, start, inside)

    def _channels(
        self,
        sums: Buffer,
        input_block: Expr,
        tap_row: Expr,
        tap_column: Expr,
        start: Expr,
        pixels: Sequence[int],
    ) -> None:
        count = self.conv.tile.channel_blocks
        with T.serial(0, self._channels_of(input_block)) as channel:
            for pixel in pixels:
                value = splat(self._input(input_block, tap_row, tap_column, start + pixel, channel))
                for block in range(count):
                    lane = _lane(pixel, block, count)
                    weight = self._weights(input_block, (tap_row, tap_column), channel, block)
                    store(sums, [lane], sums[lane] + value * weight)

    def _weights(
        self, input_block: Expr, tap: tuple[Expr, Expr], channel: Expr, block: int
    ) -> Expr:
        """What a channel of a tap counts for in a block of filters."""
        return self.weight[self.filter_tile, input_block, *tap, channel, ramp(block * LANES)]

    def _channels_of(self, input_block: Expr) -> Expr:
        used = self.conv.last_channels
        if not used:
            return self.conv.inner_channels
        if self.conv.group_blocks == 1:
            return used
        return T.if_then_else(input_block == self.conv.group_blocks - 1, used, LANES)

    def _input(
        self, input_block: Expr, tap_row: Expr, tap_column: Expr, pixel: Expr, channel: Expr
    ) -> Expr:
        conv = self.conv
        row = self.geometry.row(self.row, tap_row)
        column = self.geometry.column(pixel, tap_column)
        if conv.plain_input:
            return self.x[self.image, channel, row, column]
        if conv.groups > 1:
            tiles_per_group = conv.filter_groups // conv.groups
            group = T.floordiv(self.filter_tile, tiles_per_group)
            input_block = group * conv.group_blocks + input_block
        return self.x[self.image, input_block, row, column, channel]

    def _place(self, start: Expr, pixel: int, block: int) -> list[Expr]:
        channel_block = self.filter_tile * self.conv.tile.channel_blocks + block
        return [self.image, channel_block, self.row, start + pixel, ramp(0)]

    def _store(self, sums: Buffer, start: Expr, pixel: int, block: int) -> None:
        count = self.conv.tile.channel_blocks
        place = self._place(start, pixel, block)
        result = apply_steps(
            self.conv.steps,
            sums[_lane(pixel, block, count)],
            tuple(self.operands),
            _reader(place),
            _reader([ramp((self.filter_tile * count + block) * LANES)]),
        )
        store(self.y, place, result)


def _reader(place: list[Expr]) -> Callable[[Buffer], Expr]:
    return lambda buffer: buffer[tuple(place)]


def _lane(pixel: int, block: int, count: int) -> Expr:
    return ramp((pixel * count + block) * LANES)
