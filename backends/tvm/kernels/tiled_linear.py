"""Tiles of fully connected layers whose weights have few different values."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import LANES, Buffer, Expr, Kernel, ceil_div, ramp
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps
from shohin.backends.tvm.kernels.matmul import MatrixTile
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes


@dataclass(frozen=True)
class TiledLinear(Kernel):
    """``y = steps(x @ w.T + bias)`` with ``x`` ``[M, K]`` and ``y`` ``[M, N]``.

    Attributes:
        rows: M.
        depth: K.
        columns: N.
        form: how weights are stored.
        tile: sums.
        steps: element-wise steps; ``full`` operands are ``[M, N]``, ``channel`` ones are along N,
            padded like the bias to whole tiles.
    """

    rows: int
    depth: int
    columns: int
    form: object
    tile: MatrixTile
    steps: tuple[Step, ...] = ()

    tiling = frozenset({"tile"})

    @property
    def tile_columns(self) -> int:
        """Columns of a whole tile."""
        return LANES * self.tile.column_blocks

    @property
    def column_tiles(self) -> int:
        """Tiles along N."""
        return ceil_div(self.columns, self.tile_columns)

    @property
    def row_tiles(self) -> int:
        """Tiles along M."""
        return ceil_div(self.rows, self.tile.rows)

    @property
    def padded_columns(self) -> int:
        """Columns in whole tiles."""
        return self.column_tiles * self.tile_columns

    @property
    def extent(self) -> int:
        """Tiles."""
        return self.column_tiles * self.row_tiles

    @property
    def operations(self) -> int:
        """Multiply-accumulates."""
        return self.rows * self.depth * self.columns

    @abstractmethod
    def emitter(self, item: Expr, buffers: tuple[Buffer, ...]) -> "TiledEmitter":
        """What emits the tile of a work item."""

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One tile of the result; ragged edges are separate code."""
        emitter = self.emitter(item, buffers)

        def over_columns(rows: int) -> None:
            whole_or_rest(
                emitter.column_tile,
                self.tile_columns,
                self.columns,
                lambda width: emitter.emit(rows, width),
            )

        whole_or_rest(emitter.row_tile, self.tile.rows, self.rows, over_columns)


class TiledEmitter(ABC):
    """Emits one tile; holds what full and ragged tiles share.

    Args:
        linear: the kernel.
        item: the work item.
        buffers: bias, step operands, result.
    """

    def __init__(self, linear: TiledLinear, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.linear = linear
        self.bias, *operands, self.y = buffers
        self.operands = tuple(operands)
        self.row_tile = T.floormod(item, linear.row_tiles)
        self.column_tile = T.floordiv(item, linear.row_tiles)

    @abstractmethod
    def emit(self, rows: int, columns: int) -> None:
        """A tile of `rows` by `columns` results."""

    def row(self, row: int) -> Expr:
        """Number of a row of the tile among all."""
        return self.row_tile * self.linear.tile.rows + row

    def column(self, block: int) -> Expr:
        """Number of the first column of a block of the tile among all."""
        return self.column_tile * self.linear.tile_columns + block * LANES

    def finish(self, total: Expr, row: int, block: int, columns: int) -> None:
        """Store the result of sums of products.

        Args:
            total: sums of 16 columns.
            row: row of the tile.
            block: which sixteen columns of the tile.
            columns: how many columns the tile has.
        """
        column, valid = self.column(block), min(LANES, columns - block * LANES)

        def place(last: Expr) -> list[Expr]:
            return [self.row(row), last]

        result = apply_steps(
            self.linear.steps,
            total + self.bias[ramp(column)],
            self.operands,
            lambda buffer: load_lanes(buffer, place, column, valid),
            lambda buffer: buffer[ramp(column)],
        )
        store_lanes(self.y, place, column, result, valid)
