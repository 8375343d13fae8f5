"""Matrix products: fully connected layers with packed weights, and batched products.

A fully connected layer reads weights packed as ``[N/NR, K, NR]``, so that every step along K is
one broadcast of the input and NR/16 contiguous vectors; at one row the kernel streams the weights
once, at many rows a tile of MR x NR sums stays in registers. A batched product reads its second
operand where it lies, ``[B, K, N]``.
"""

from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    ceil_div,
    local,
    number,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes


@dataclass(frozen=True)
class MatrixTile:
    """Sums of one tile.

    Attributes:
        rows: rows of the result.
        column_blocks: blocks of 16 columns.
        splits: independent sums along K, so that few rows still hide the latency of an FMA.
    """

    rows: int
    column_blocks: int
    splits: int = 1


@dataclass(frozen=True)
class MatMul(Kernel):
    """``y[b] = steps(a[b] @ w[b] + bias)`` with ``a`` ``[B, M, K]`` and ``y`` ``[B, M, N]``.

    Attributes:
        batch: B; 1 for fully connected layers.
        rows: M.
        depth: K.
        columns: N.
        packed: whether ``w`` is packed ``[N/NR, K, NR]`` (and ``bias`` padded alike), or plain
            ``[B, K, N]``.
        bias: whether there is a bias.
        scale: factor on the product, before the bias.
        tile: sums.
        steps: element-wise steps; ``full`` operands are ``[B, M, N]``, ``channel`` ones are along
            N, padded like the bias.
    """

    batch: int
    rows: int
    depth: int
    columns: int
    packed: bool
    bias: bool
    tile: MatrixTile
    scale: float = 1.0
    steps: tuple[Step, ...] = ()

    tiling = frozenset({"tile"})

    @property
    def family(self) -> str:
        """``linear`` with packed weights, else ``matmul``."""
        return "linear" if self.packed else "matmul"

    @property
    def column_tiles(self) -> int:
        """Tiles along N."""
        return ceil_div(self.columns, LANES * self.tile.column_blocks)

    @property
    def row_tiles(self) -> int:
        """Tiles along M."""
        return ceil_div(self.rows, self.tile.rows)

    @property
    def padded_columns(self) -> int:
        """Columns in whole tiles."""
        return self.column_tiles * LANES * self.tile.column_blocks

    @property
    def extent(self) -> int:
        """Batch times tiles."""
        return self.batch * self.column_tiles * self.row_tiles

    @property
    def operations(self) -> int:
        """Multiply-accumulates, and weights read: a single row is bound by memory."""
        return self.batch * self.rows * self.depth * self.columns

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The product in every tile shape that fits the registers."""
        options = matrix_tile_options(self.rows, self.columns, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Rows times column blocks times sums along K."""
        return f"{self.tile.rows}x{self.tile.column_blocks}x{self.tile.splits}"

    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the second operand."""
        if self.packed:
            return (self.column_tiles, self.depth, LANES * self.tile.column_blocks)
        return (self.batch, self.depth, self.columns)

    def parameters(self) -> tuple[Parameter, ...]:
        """First operand, second operand, bias if any, step operands, result."""
        result = (self.batch, self.rows, self.columns)
        bias = [Parameter("bias", (self.padded_columns,))] if self.bias else []
        return (
            Parameter("a", (self.batch, self.rows, self.depth)),
            Parameter("weight", self.weight_shape()),
            *bias,
            *operand_parameters(self.steps, result, self.padded_columns),
            Parameter("y", result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One tile of the result; ragged edges are separate code."""
        emitter = TileEmitter(self, item, buffers)
        columns = LANES * self.tile.column_blocks

        def over_columns(rows: int) -> None:
            whole_or_rest(
                emitter.column_tile, columns, self.columns, lambda width: emitter.emit(rows, width)
            )

        whole_or_rest(emitter.row_tile, self.tile.rows, self.rows, over_columns)


class TileEmitter:
    """Emits one tile; holds what full and ragged tiles share."""

    def __init__(self, matmul: MatMul, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.matmul = matmul
        self.a, self.weight, *rest = buffers
        self.y = rest.pop()
        self.bias = rest.pop(0) if matmul.bias else None
        self.operands = tuple(rest)
        self.row_tile = T.floormod(item, matmul.row_tiles)
        self.column_tile = T.floormod(T.floordiv(item, matmul.row_tiles), matmul.column_tiles)
        self.image = T.floordiv(item, matmul.row_tiles * matmul.column_tiles)

    def emit(self, rows: int, columns: int) -> None:
        """A tile of `rows` by `columns` results."""
        tile = self.matmul.tile
        count = ceil_div(columns, LANES)
        splits = tile.splits if self.matmul.depth % tile.splits == 0 else 1
        sums = local(rows * count * splits * LANES)
        for index in range(rows * count * splits):
            store(sums, [ramp(index * LANES)], number(0.0))
        self._sum(sums, splits, rows, columns)
        for row in range(rows):
            for block in range(count):
                parts = [
                    sums[ramp(((s * rows + row) * count + block) * LANES)] for s in range(splits)
                ]
                self._finish(_tree_sum(parts), row, block, min(LANES, columns - block * LANES))

    def _sum(self, sums: Buffer, splits: int, rows: int, columns: int) -> None:
        """Add all products, those of neighbouring inputs to different splits."""
        with T.serial(0, self.matmul.depth // splits) as k:
            for split in range(splits):
                self._accumulate(sums, k * splits + split, split, rows, columns)

    def _accumulate(self, sums: Buffer, k: Expr, split: int, rows: int, columns: int) -> None:
        count = ceil_div(columns, LANES)
        vectors = [self._weight(k, block, columns) for block in range(count)]
        for row in range(rows):
            value = splat(self.a[self.image, self._row(row), k])
            for block, vector in enumerate(vectors):
                lane = ramp(((split * rows + row) * count + block) * LANES)
                store(sums, [lane], sums[lane] + value * vector)

    def _weight(self, k: Expr, block: int, columns: int) -> Expr:
        if self.matmul.packed:
            return self.weight[self.column_tile, k, ramp(block * LANES)]
        valid = min(LANES, columns - block * LANES)
        return load_lanes(
            self.weight, lambda last: [self.image, k, last], self._column(block), valid
        )

    def _row(self, row: int) -> Expr:
        return self.row_tile * self.matmul.tile.rows + row

    def _column(self, block: int) -> Expr:
        return (self.column_tile * self.matmul.tile.column_blocks + block) * LANES

    def _finish(self, total: Expr, row: int, block: int, valid: int) -> None:
        matmul = self.matmul
        column = self._column(block)
        if matmul.scale != 1.0:
            total = total * number(matmul.scale)
        if self.bias is not None:
            total = total + self.bias[ramp(column)]

        def place(last: Expr) -> list[Expr]:
            return [self.image, self._row(row), last]

        result = apply_steps(
            matmul.steps,
            total,
            self.operands,
            lambda buffer: load_lanes(buffer, place, column, valid),
            lambda buffer: buffer[ramp(column)],
        )
        store_lanes(self.y, place, column, result, valid)


def _tree_sum(parts: list[Expr]) -> Expr:
    while len(parts) > 1:
        parts = [sum(parts[i + 1 : i + 2], parts[i]) for i in range(0, len(parts), 2)]
    return parts[0]


def matrix_tile_options(rows: int, columns: int, registers: int) -> list[MatrixTile]:
    """Tiles whose sums fit the registers, cheapest first by the cost model.

    Args:
        rows: M.
        columns: N.
        registers: vectors of 16 floats that registers hold, sums and weights together; a single
            row takes its weights from memory.
    """
    tiles = set()
    column_blocks = ceil_div(columns, LANES)
    widest = registers if rows == 1 else max(1, registers // 2)
    for count in range(1, min(8, column_blocks, widest) + 1):
        most = max(1, registers // count - 1)
        for cuts in range(ceil_div(rows, most), min(ceil_div(rows, most) + 2, rows + 1)):
            height = ceil_div(rows, cuts)
            splits = [s for s in (1, 2, 4) if s * height * count <= min(registers, 16)] or [1]
            tiles |= {MatrixTile(height, count, s) for s in splits}
    return sorted(tiles, key=lambda tile: (_matrix_cost(tile, rows, column_blocks), repr(tile)))


def choose_matrix_tile(rows: int, columns: int, registers: int) -> MatrixTile:
    """The cheapest of `matrix_tile_options`."""
    return matrix_tile_options(rows, columns, registers)[0]


def _matrix_cost(tile: MatrixTile, rows: int, column_blocks: int) -> float:
    """Cycles a step along K takes: sums, loads, latency of few sums, and unused columns."""
    used = ceil_div(column_blocks, tile.column_blocks) * tile.column_blocks / column_blocks
    height = rows / ceil_div(rows, tile.rows)
    sums = tile.rows * tile.column_blocks
    loads = tile.column_blocks + tile.rows
    latency = 8.0 / tile.splits
    cycles = max(sums, loads / 2, latency) + 0.15 * loads + 0.05 * tile.splits
    return used * cycles / (height * tile.column_blocks)
