"""Direct convolution: blocked channels out, blocked or plain channels in.

Layouts: input ``[N, C/16, H, W, 16]`` or plain ``[N, C, H, W]`` (few channels), weights
``[O/NR, C/16, KH, KW, 16, NR]``, output ``[N, O/16, OH, OW, 16]``. One work item is one output
row of one block of NR channels. The row is cut in tiles whose accumulators fill the registers.
Tiles that touch the left or right border are emitted with their position known, so that taps
outside the image are left out when the code is made: there is no padded copy of the input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T  # noqa: N812

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
        geometry: sizes, stride, padding.
        groups: both channels per group are whole blocks where this is not 1.
        plain_input: whether the input is plain NCHW.
        tile: accumulators.
        steps: element-wise steps on the result.
        output_blocks: blocks of channels from one output image to the next; 0 for those computed.
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
        """Filter tiles times images times output rows."""
        return self.filter_groups * self.batch * self.geometry.output_size[0]

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
        taps = self.group_blocks * self.inner_channels * rows * columns
        return self.batch * self.filters * height * width * taps

    def variants(self, accumulators: int) -> tuple[Kernel, ...]:
        """The convolution in every tile shape that fits the registers."""
        filter_blocks = self.filters // LANES // self.groups
        options = tile_options(self.geometry.output_size[1], filter_blocks, accumulators)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Pixels times channel blocks."""
        return f"{self.tile.width}x{self.tile.channel_blocks}"

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
        """One output row of one tile of filters."""
        emitter = _RowEmitter(self, item, buffers)
        self.geometry.for_each_tile(self.tile.width, emitter.emit_tile)


class _RowEmitter:
    """Emits one output row; holds what its tiles share."""

    def __init__(self, conv: Conv2d, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.conv = conv
        self.geometry = conv.geometry
        self.x, self.weight, self.bias, *self.operands, self.y = buffers
        height = self.geometry.output_size[0]
        self.filter_tile = T.floordiv(item, height * conv.batch)
        self.image = T.floormod(T.floordiv(item, height), conv.batch)
        self.row = T.floormod(item, height)

    def emit_tile(self, start: Expr, width: int, position: int | None) -> None:
        """Emit `width` pixels from `start`; `position` is `start` where it is known, else None."""
        count = self.conv.tile.channel_blocks
        sums = local(width * count * LANES)
        for pixel in range(width):
            for block in range(count):
                channel = (self.filter_tile * count + block) * LANES
                store(sums, [_lane(pixel, block, count)], self.bias[ramp(channel)])
        with T.serial(0, self.conv.group_blocks) as input_block:
            low, high = self.geometry.tap_rows(self.row)
            with T.serial(low, high) as tap_row:
                self._columns(sums, input_block, tap_row, start, width, position)
        for pixel in range(width):
            for block in range(count):
                self._store(sums, start, pixel, block)

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
        row = self.geometry.row(self.row, tap_row)
        column = self.geometry.column(pixel, tap_column)
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


def tile_options(
    out_width: int, filter_blocks: int, accumulators: int, blocks_limit: int = 4
) -> list[ConvTile]:
    """Tiles whose accumulators fit the registers, cheapest first by the cost model.

    Args:
        out_width: pixels of a row.
        filter_blocks: whole blocks of filters of a group.
        accumulators: blocks of 16 floats that registers can hold beside weights and inputs.
        blocks_limit: most channel blocks a tile may have.
    """
    counts = [c for c in range(1, min(blocks_limit, accumulators) + 1) if filter_blocks % c == 0]
    tiles = set()
    for count in counts:
        fewest = ceil_div(out_width, accumulators // count)
        cuts = range(fewest, min(fewest + 3, out_width + 1))
        tiles |= {ConvTile(ceil_div(out_width, number), count) for number in cuts}
    return sorted(tiles, key=lambda t: (_tile_cost(t, out_width), t.width, t.channel_blocks))


def choose_tile(
    out_width: int, filter_blocks: int, accumulators: int, blocks_limit: int = 4
) -> ConvTile:
    """The cheapest of `tile_options`."""
    return tile_options(out_width, filter_blocks, accumulators, blocks_limit)[0]


def _tile_cost(tile: ConvTile, out_width: int) -> float:
    """Cycles a multiply-accumulate takes: loads beside it, and too few independent sums."""
    whole, tail = divmod(out_width, tile.width)
    widths = [tile.width] * whole + ([tail] if tail else [])
    cycles = 0.0
    for width in widths:
        sums = width * tile.channel_blocks
        loads = tile.channel_blocks + width
        cycles += max(sums, loads / 2, 4.0) + 0.15 * loads
    return cycles / (out_width * tile.channel_blocks)
