"""Direct convolution: blocked channels out, blocked or plain channels in.

Layouts: input ``[N, C/16, H, W, 16]`` or plain ``[N, C, H, W]`` (few channels), weights
``[O/NR, C/16, KH, KW, 16, NR]``, output ``[N, O/16, OH, OW, 16]``. One work item is one output
row of one block of NR channels. The row is cut in tiles whose accumulators fill the registers.
Tiles that touch the left or right border are emitted with their position known, so that taps
outside the image are left out when the code is made: there is no padded copy of the input.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    local,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_count


@dataclass(frozen=True)
class ConvTile:
    """Accumulators of one tile: `width` output pixels times `channel_blocks` blocks of 16."""

    width: int
    channel_blocks: int


@dataclass(frozen=True)
class Conv2d(Kernel):
    """A convolution with fused bias and element-wise steps.

    Attributes:
        batch: images.
        channels: input channels, all groups together; a multiple of 16 unless `plain_input`.
        filters: output channels in whole blocks, all groups together.
        size: input height and width.
        kernel: height and width of a filter.
        stride: vertical and horizontal.
        padding: (top, bottom, left, right), zeros.
        dilation: vertical and horizontal.
        groups: both channels per group are whole blocks where this is not 1.
        plain_input: whether the input is plain NCHW.
        tile: accumulators.
        steps: element-wise steps on the result.
    """

    batch: int
    channels: int
    filters: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    plain_input: bool
    tile: ConvTile
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``conv2d``."""
        return "conv2d"

    @property
    def output_size(self) -> tuple[int, int]:
        """Output height and width."""
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return (
            (self.size[0] + top + bottom - reach[0]) // self.stride[0] + 1,
            (self.size[1] + left + right - reach[1]) // self.stride[1] + 1,
        )

    @property
    def filter_groups(self) -> int:
        """Number of tiles of filters."""
        return self.filters // (LANES * self.tile.channel_blocks)

    @property
    def extent(self) -> int:
        """Filter tiles times images times output rows."""
        return self.filter_groups * self.batch * self.output_size[0]

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
        height, width = self.output_size
        taps = self.group_blocks * self.inner_channels * self.kernel[0] * self.kernel[1]
        return self.batch * self.filters * height * width * taps

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the packed weights."""
        nr = LANES * self.tile.channel_blocks
        return (self.filter_groups, self.group_blocks, *self.kernel, self.inner_channels, nr)

    def input_shape(self) -> tuple[int, ...]:
        """Physical shape of the input."""
        if self.plain_input:
            return (self.batch, self.channels, *self.size)
        return (self.batch, self.channels // LANES, *self.size, LANES)

    def output_shape(self) -> tuple[int, ...]:
        """Physical shape of the output."""
        return (self.batch, self.filters // LANES, *self.output_size, LANES)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, bias, step operands, output."""
        operands = [
            Parameter(
                f"operand{i}",
                self.output_shape() if step.operand == "full" else (self.filters,),
            )
            for i, step in enumerate(s for s in self.steps if s.operand != "none")
        ]
        return (
            Parameter("x", self.input_shape()),
            Parameter("weight", self.weight_shape()),
            Parameter("bias", (self.filters,)),
            *operands,
            Parameter("y", self.output_shape()),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output row of one tile of filters."""
        _RowEmitter(self, item, buffers).emit()


class _RowEmitter:
    """Emits one output row; holds what its tiles share."""

    def __init__(self, conv: Conv2d, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.conv = conv
        self.x, self.weight, self.bias, *self.operands, self.y = buffers
        height = conv.output_size[0]
        self.filter_tile = T.floordiv(item, height * conv.batch)
        self.image = T.floormod(T.floordiv(item, height), conv.batch)
        self.row = T.floormod(item, height)
        self.top = self.row * conv.stride[0] - conv.padding[0]

    def emit(self) -> None:
        conv = self.conv
        width = conv.tile.width
        out_width = conv.output_size[1]
        starts = range(0, out_width, width)
        interior = [s for s in starts if s + width <= out_width and self._inside(s, width)]
        for start in starts:
            if start not in interior:
                self._tile(start, min(width, out_width - start), start)
        if interior:
            with T.serial(0, len(interior)) as index:
                self._tile(interior[0] + index * width, width, None)

    def _inside(self, start: int, width: int) -> bool:
        conv = self.conv
        first = start * conv.stride[1] - conv.padding[2]
        last = (start + width - 1) * conv.stride[1] - conv.padding[2]
        return first >= 0 and last + (conv.kernel[1] - 1) * conv.dilation[1] < conv.size[1]

    def _tile(self, start: Expr, width: int, position: int | None) -> None:
        """Emit `width` pixels from `start`; `position` is `start` where it is known, else None."""
        conv = self.conv
        count = conv.tile.channel_blocks
        sums = local(width * count * LANES)
        for pixel in range(width):
            for block in range(count):
                channel = (self.filter_tile * count + block) * LANES
                store(sums, [_lane(pixel, block, count)], self.bias[ramp(channel)])
        with T.serial(0, conv.group_blocks) as input_block:
            self._rows(sums, input_block, start, width, position)
        for pixel in range(width):
            for block in range(count):
                self._store(sums, start, pixel, block)

    def _rows(
        self, sums: Buffer, input_block: Expr, start: Expr, width: int, position: int | None
    ) -> None:
        conv = self.conv
        low, high = 0, conv.kernel[0]
        if conv.padding[0] or conv.padding[1]:
            step = conv.dilation[0]
            low = T.max(0, T.floordiv(step - 1 - self.top, step))
            high = T.min(conv.kernel[0], T.floordiv(conv.size[0] - 1 - self.top, step) + 1)
        with T.serial(low, high) as tap_row:
            self._columns(sums, input_block, tap_row, start, width, position)

    def _columns(
        self,
        sums: Buffer,
        input_block: Expr,
        tap_row: Expr,
        start: Expr,
        width: int,
        position: int | None,
    ) -> None:
        conv = self.conv
        if position is None:
            with T.serial(0, conv.kernel[1]) as tap_column:
                self._channels(sums, input_block, tap_row, tap_column, start, range(width))
            return
        for tap_column in range(conv.kernel[1]):
            inside = [pixel for pixel in range(width) if self._valid(position + pixel, tap_column)]
            if inside:
                self._channels(sums, input_block, tap_row, tap_column, start, inside)

    def _valid(self, pixel: int, tap_column: int) -> bool:
        conv = self.conv
        column = pixel * conv.stride[1] - conv.padding[2] + tap_column * conv.dilation[1]
        return 0 <= column < conv.size[1]

    def _channels(
        self,
        sums: Buffer,
        input_block: Expr,
        tap_row: Expr,
        tap_column: Expr,
        start: Expr,
        pixels: "range | list[int]",
    ) -> None:
        count = self.conv.tile.channel_blocks
        with T.serial(0, self.conv.inner_channels) as channel:
            for pixel in pixels:
                value = splat(self._input(input_block, tap_row, tap_column, start + pixel, channel))
                for block in range(count):
                    lane = _lane(pixel, block, count)
                    weight = self.weight[
                        self.filter_tile, input_block, tap_row, tap_column, channel,
                        ramp(block * LANES),
                    ]  # fmt: skip
                    store(sums, [lane], sums[lane] + value * weight)

    def _input(
        self, input_block: Expr, tap_row: Expr, tap_column: Expr, pixel: Expr, channel: Expr
    ) -> Expr:
        conv = self.conv
        row = self.top + tap_row * conv.dilation[0]
        column = pixel * conv.stride[1] - conv.padding[2] + tap_column * conv.dilation[1]
        if conv.plain_input:
            return self.x[self.image, channel, row, column]
        if conv.groups > 1:
            tiles_per_group = conv.filter_groups // conv.groups
            group = T.floordiv(self.filter_tile, tiles_per_group)
            input_block = group * conv.group_blocks + input_block
        return self.x[self.image, input_block, row, column, channel]

    def _store(self, sums: Buffer, start: Expr, pixel: int, block: int) -> None:
        count = self.conv.tile.channel_blocks
        channel_block = self.filter_tile * count + block
        place = [self.image, channel_block, self.row, start + pixel, ramp(0)]
        result = apply_steps(
            self.conv.steps,
            sums[_lane(pixel, block, count)],
            tuple(self.operands),
            _reader(place),
            _reader([ramp(channel_block * LANES)]),
        )
        store(self.y, place, result)


def _reader(place: list[Expr]) -> Callable[[Buffer], Expr]:
    return lambda buffer: buffer[tuple(place)]


def _lane(pixel: int, block: int, count: int) -> Expr:
    return ramp((pixel * count + block) * LANES)


def choose_tile(
    out_width: int, filter_blocks: int, accumulators: int, blocks_limit: int = 4
) -> ConvTile:
    """A tile whose accumulators fit the registers.

    Args:
        out_width: pixels of a row.
        filter_blocks: whole blocks of filters of a group.
        accumulators: blocks of 16 floats that registers can hold beside weights and inputs.
        blocks_limit: most channel blocks a tile may have.
    """
    best = ConvTile(1, 1)
    best_cost = float("inf")
    for count in range(1, min(blocks_limit, filter_blocks, accumulators) + 1):
        if filter_blocks % count:
            continue
        most = accumulators // count
        tiles = -(-out_width // most)
        tile = ConvTile(-(-out_width // tiles), count)
        cost = _tile_cost(tile, out_width)
        if cost < best_cost:
            best, best_cost = tile, cost
    return best


def _tile_cost(tile: ConvTile, out_width: int) -> float:
    """Cycles a multiply-accumulate takes: loads beside it, and too few independent sums."""
    tail = out_width % tile.width or tile.width
    widths = [tile.width] * (out_width // tile.width) + ([tail] if tail != tile.width else [])
    cycles = 0.0
    for width in widths:
        sums = width * tile.channel_blocks
        loads = tile.channel_blocks + width
        cycles += max(sums, loads / 2, 4.0) + 0.15 * loads
    return cycles / (out_width * tile.channel_blocks)


def filter_tiles(filters: int) -> int:
    """Filters rounded up to whole blocks."""
    return blocks(filters) * LANES
