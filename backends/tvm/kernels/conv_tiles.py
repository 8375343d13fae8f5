"""Tile shapes of convolutions, and what they cost."""

from dataclasses import dataclass, replace

from shohin.backends.tvm.kernels.emit import LANES, ceil_div

_CACHED_WEIGHTS = 600_000
"""Bytes of weights that stay in a second level cache of 1 MiB beside inputs and outputs."""

_CACHED_PART = 300_000
"""Bytes of weights that a cut aims at, for smaller caches."""

_ROWS = 7
"""Rows that share a part of the weights before the next part is read."""


@dataclass(frozen=True)
class ConvTile:
    """How a convolution is cut.

    Attributes:
        width: output pixels whose sums are in registers together.
        channel_blocks: blocks of 16 filters whose sums are in registers together.
        rows: output rows of a work item.
        input_blocks: input blocks that all rows of an item are summed over before the next input
            blocks, the sums waiting in the output; 0 for all at once. This keeps the weights in
            use small enough for a cache.
    """

    width: int
    channel_blocks: int
    rows: int = 1
    input_blocks: int = 0

    def text(self) -> str:
        """Pixels times channel blocks, then the cache blocking if any."""
        blocking = f"/{self.rows}r{self.input_blocks}c" if self.input_blocks else ""
        return f"{self.width}x{self.channel_blocks}{blocking}"


def cache_blocked(
    tiles: list[ConvTile], height: int, input_blocks: int, taps: int
) -> list[ConvTile]:
    """The same tiles, those with more weights than a cache holds also cut for the cache.

    Args:
        tiles: register tiles, cheapest first.
        height: output rows.
        input_blocks: input blocks that one filter reads.
        taps: positions of a filter.

    Returns:
        Tiles cheapest first; a cut one comes before the tile that it is a cut of.
    """
    options = []
    for tile in tiles:
        block_bytes = taps * LANES * LANES * tile.channel_blocks * 4
        if input_blocks * block_bytes > _CACHED_WEIGHTS and height > 1:
            parts = ceil_div(input_blocks * block_bytes, _CACHED_PART)
            rows = ceil_div(height, ceil_div(height, _ROWS))
            options.append(replace(tile, rows=rows, input_blocks=ceil_div(input_blocks, parts)))
        options.append(tile)
    return options


def tile_options(
    out_width: int, filter_blocks: int, registers: int, blocks_limit: int = 4
) -> list[ConvTile]:
    """Tiles whose sums and weights fit the registers, cheapest first by the cost model.

    Args:
        out_width: pixels of a row.
        filter_blocks: whole blocks of filters of a group.
        registers: vectors of 16 floats that registers hold, sums and weights together.
        blocks_limit: most channel blocks a tile may have.
    """
    most = min(blocks_limit, max(1, registers // 2))
    counts = [c for c in range(1, most + 1) if filter_blocks % c == 0]
    tiles = set()
    for count in counts:
        fewest = ceil_div(out_width, max(1, registers // count - 1))
        cuts = range(fewest, min(fewest + 3, out_width + 1))
        tiles |= {ConvTile(ceil_div(out_width, number), count) for number in cuts}
    return sorted(tiles, key=lambda t: (_tile_cost(t, out_width), t.width, t.channel_blocks))


def choose_tile(
    out_width: int, filter_blocks: int, registers: int, blocks_limit: int = 4
) -> ConvTile:
    """The cheapest of `tile_options`."""
    return tile_options(out_width, filter_blocks, registers, blocks_limit)[0]


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
