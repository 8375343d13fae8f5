"""Products of matrices in tiles: what convolutions and layers of many rows are made of.

A block of threads computes a tile of ``left @ right``. Both operands come through shared memory,
`step` words of their common axis at a time, a word being a float or four bytes. Threads multiply
them one by one, or warps by tensor cores:

| unit | a word is | instruction |
|---|---|---|
| ``fma`` | a float | fused multiply-add |
| ``dp4a`` | four bytes | sum of four products of bytes, exact |
| ``mma-float`` | a float | ``mma.m16n8k8`` of three products of TF32 (Markidis et al. 2018) |
| ``mma-bytes`` | four bytes | ``mma.m16n8k32`` of bytes, exact |

TF32 keeps 10 bits of a float. Written as a sum of two such numbers, floats are multiplied as
``large * large + large * small + small * large``; what is left out is 2**-22 of the product.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import (
    WARP,
    BlockIndex,
    GridKernel,
    device_call,
    shared,
    synchronise,
)
from shohin.backends.tvm.kernels.emit import Buffer, Expr, ceil_div, local, store

UnitName: TypeAlias = Literal["fma", "dp4a", "mma-float", "mma-bytes"]

_MMA = (16, 8, 8)
"""Rows, columns and words of a tensor core's product."""

_APART = 8
"""Words between the lines of a shared tile beyond its own, so that lines begin in other banks."""


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes.

    Attributes:
        rows: of the left operand.
        columns: of the right operand.
        across: threads, or warps for tensor cores, that share the rows.
        along: threads or warps that share the columns.
        step: words of the common axis that are in shared memory at a time.
    """

    rows: int
    columns: int
    across: int
    along: int
    step: int = 16

    def threads(self, unit: UnitName) -> int:
        """Threads of a block."""
        return self.across * self.along * (WARP if unit.startswith("mma") else 1)


_THREAD_TILES = (
    Tile(128, 128, 16, 16),
    Tile(64, 64, 8, 16),
    Tile(32, 64, 8, 16),
    Tile(16, 64, 4, 16),
    Tile(32, 32, 8, 8),
    Tile(16, 32, 8, 8),
    Tile(16, 16, 8, 8),
)
_WARP_TILES = (
    Tile(128, 128, 4, 2),
    Tile(64, 64, 2, 2),
    Tile(32, 64, 2, 2),
    Tile(16, 64, 1, 4),
    Tile(32, 32, 2, 2),
    Tile(16, 32, 1, 4),
)

MULTIPROCESSORS = 108
"""Of the GPU that tiles are chosen for; others differ little in what pays on them."""


def choose_tile(unit: UnitName, rows: int, columns: int, batch: int) -> Tile:
    """The tile that should take the least time, by the rounds of blocks and what each costs.

    A tile costs its products, and reading its operands: the less of these, the larger it is.
    """
    tiles = _WARP_TILES if unit.startswith("mma") else _THREAD_TILES

    def cost(tile: Tile) -> float:
        blocks = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns) * batch
        # Several small blocks run on a multiprocessor at a time.
        rounds = max(1.0, blocks / MULTIPROCESSORS)
        return rounds * (tile.rows * tile.columns + 16 * (tile.rows + tile.columns) + 256)

    return min(tiles, key=cost)


def line_of(words: int, length: int, dtype: str) -> Buffer:
    """Shared memory for so many words of some rows or columns."""
    return shared((words, length + _APART), dtype)


@dataclass(frozen=True)
class TiledProduct(GridKernel):
    """A batch of products of a left and a right operand, in tiles.

    Attributes:
        unit: what multiplies.
        tile: what a block computes.
    """

    unit: UnitName
    tile: Tile

    @property
    @abstractmethod
    def size(self) -> tuple[int, int, int, int]:
        """Products, and the rows, columns and words of the common axis of each."""

    @abstractmethod
    def left(self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr]) -> Expr:
        """A word of the left operand.

        Args:
            buffers: the parameters.
            place: product, row, and word of the common axis; the latter two may lie beyond the
                sizes, as far as the tile goes on. Words beyond the common axis must be zero.
        """

    @abstractmethod
    def column(self, product: Expr, column: Expr) -> Any:
        """What all words of a column need, calculated once. The column may not exist."""

    @abstractmethod
    def right(self, buffers: tuple[Buffer, ...], known: Any, word: Expr) -> Expr:
        """A word of the right operand; finite wherever the left operand's is zero.

        Args:
            buffers: the parameters.
            known: what `column` gave.
            word: of the common axis; may lie beyond it, as far as the tile goes on.
        """

    @abstractmethod
    def finish(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr], total: Expr
    ) -> None:
        """Store a result.

        Args:
            buffers: the parameters.
            place: product, row and column, all of which exist.
            total: the sum of products.
        """

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of columns of every product, tiles of rows."""
        batch, rows, _, _ = self.size
        return batch * self._column_tiles, ceil_div(rows, self.tile.rows)

    @property
    def _column_tiles(self) -> int:
        return ceil_div(self.size[2], self.tile.columns)

    @property
    def threads(self) -> int:
        """Of the tile."""
        return self.tile.threads(self.unit)

    def tile_text(self) -> str:
        """``64x64 fma``."""
        return f"{self.tile.rows}x{self.tile.columns} {self.unit}"

    @property
    def word(self) -> str:
        """Element type of words and sums."""
        return "float32" if self.unit in ("fma", "mma-float") else "int32"

    def emit(self, block: BlockIndex, thread: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One tile."""
        tile = self.tile
        lines = (
            line_of(tile.step, tile.rows, self.word),
            line_of(tile.step, tile.columns, self.word),
        )
        product = T.bind(T.floordiv(block[0], self._column_tiles))
        column = T.floormod(block[0], self._column_tiles) * tile.columns
        first = (T.bind(block[1] * tile.rows), T.bind(column))
        loads = Loads(self, buffers, product, first, thread)
        sums = self.accumulate(thread, loads, lines)
        for row, column, total in self.results(thread, sums):
            self.finish_existing(buffers, (product, first[0] + row, first[1] + column), total)

    def accumulate(self, thread: Expr, loads: "Loads", lines: tuple[Buffer, Buffer]) -> Buffer:
        """The sums of a thread's part of a tile.

        Args:
            thread: its number.
            loads: bring words into `lines`.
            lines: shared memory for both operands.
        """
        sums, step = self.zeros(), self.tile.step
        with T.serial(0, ceil_div(self.size[3], step)) as turn:
            loads.emit_left(turn * step, lines[0])
            loads.emit_right(turn * step, lines[1])
            synchronise()
            self.multiply(thread, lines, sums)
            synchronise()
        return sums

    @property
    def _own(self) -> tuple[int, int]:
        """Rows and columns of a thread, or of a warp for tensor cores."""
        return self.tile.rows // self.tile.across, self.tile.columns // self.tile.along

    def zeros(self) -> Buffer:
        """Sums of a thread, before any product."""
        rows, columns = self._own
        count = rows * columns // (WARP if self.unit.startswith("mma") else 1)
        sums = local(count, self.word)
        zero = T.float32(0) if self.word == "float32" else T.int32(0)
        for place in range(count):
            store(sums, [place], zero)
        return sums

    def multiply(
        self, thread: Expr, lines: tuple[Buffer, Buffer], sums: Buffer, start: Expr = 0
    ) -> None:
        """Add the products of a step of words.

        Args:
            thread: its number.
            lines: words of both operands in shared memory.
            sums: of the thread.
            start: the first word in the second of `lines`.
        """
        if self.unit.startswith("mma"):
            self._multiply_by_warps(thread, lines, sums, start)
        else:
            self._multiply_by_threads(thread, lines, sums, start)

    def _multiply_by_threads(
        self, thread: Expr, lines: tuple[Buffer, Buffer], sums: Buffer, start: Expr
    ) -> None:
        (rows, columns), along = self._own, self.tile.along
        row = T.bind(T.floordiv(thread, along) * rows)
        column = T.bind(T.floormod(thread, along))
        left, right = local(rows, self.word), local(columns, self.word)
        with T.unroll(0, self.tile.step) as word:
            for i in range(rows):
                store(left, [i], lines[0][word, row + i])
            # Neighbouring threads take neighbouring columns.
            for j in range(columns):
                store(right, [j], lines[1][start + word, column + j * along])
            for i in range(rows):
                for j in range(columns):
                    place = i * columns + j
                    store(sums, [place], self._added(sums[place], left[i], right[j]))

    def _added(self, total: Expr, left: Expr, right: Expr) -> Expr:
        if self.unit == "fma":
            return total + left * right
        return device_call("int32", "__dp4a", left, right, total)

    def _multiply_by_warps(
        self, thread: Expr, lines: tuple[Buffer, Buffer], sums: Buffer, start: Expr
    ) -> None:
        """Fragments as ``mma`` takes them: PTX ISA, matrix fragments of m16n8k8 and m16n8k32."""
        (rows, columns), (high, wide, deep) = self._own, _MMA
        row, column = self._corner(thread)
        group, member = self._lanes(thread)
        left, right = local(rows // high * 4, self.word), local(columns // wide * 2, self.word)
        name = "shohin_mma_float" if self.unit == "mma-float" else "shohin_mma_bytes"
        with T.unroll(0, self.tile.step // deep) as turn:
            word = turn * deep + member
            for i in range(rows // high):
                for part in range(4):
                    own = row + i * high + part % 2 * 8 + group
                    store(left, [i * 4 + part], lines[0][word + part // 2 * 4, own])
            for j in range(columns // wide):
                for part in range(2):
                    own = column + j * wide + group
                    store(right, [j * 2 + part], lines[1][start + word + part * 4, own])
            for i in range(rows // high):
                for j in range(columns // wide):
                    place = (i * (columns // wide) + j) * 4
                    factors = [left[i * 4 + part] for part in range(4)]
                    factors += [right[j * 2 + part] for part in range(2)]
                    call = T.call_extern("int32", name, T.address_of(sums[place]), *factors)
                    T.evaluate(call)

    def _corner(self, thread: Expr) -> tuple[Expr, Expr]:
        """Where in the tile a warp's part begins."""
        warp, (rows, columns) = T.floordiv(thread, WARP), self._own
        row = T.floordiv(warp, self.tile.along) * rows
        return T.bind(row), T.bind(T.floormod(warp, self.tile.along) * columns)

    def _lanes(self, thread: Expr) -> tuple[Expr, Expr]:
        """The group of four threads that a thread of a warp is in, and its number in it."""
        lane = T.floormod(thread, WARP)
        return T.bind(T.floordiv(lane, 4)), T.bind(T.floormod(lane, 4))

    def results(self, thread: Expr, sums: Buffer) -> Sequence[tuple[Expr, Expr, Expr]]:
        """Row and column in the tile of every sum of a thread."""
        rows, columns = self._own
        if not self.unit.startswith("mma"):
            row = T.bind(T.floordiv(thread, self.tile.along) * rows)
            column = T.bind(T.floormod(thread, self.tile.along))
            return [
                (row + i, column + j * self.tile.along, sums[i * columns + j])
                for i in range(rows)
                for j in range(columns)
            ]
        high, wide, _ = _MMA
        row, column = self._corner(thread)
        group, member = self._lanes(thread)
        return [
            (
                row + i * high + part // 2 * 8 + group,
                column + j * wide + member * 2 + part % 2,
                sums[(i * (columns // wide) + j) * 4 + part],
            )
            for i in range(rows // high)
            for j in range(columns // wide)
            for part in range(4)
        ]

    def finish_existing(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr], total: Expr
    ) -> None:
        """Store a result, if there is such a row and column."""
        _, rows, columns, _ = self.size
        product, row, column = place[0], T.bind(place[1]), T.bind(place[2])
        if rows % self.tile.rows == 0 and columns % self.tile.columns == 0:
            self.finish(buffers, (product, row, column), total)
            return
        with T.If(T.And(row < rows, column < columns)), T.Then():
            self.finish(buffers, (product, row, column), total)


class Loads:
    """Brings words of both operands into shared memory, each thread some of them.

    A thread reads one row and one column, whose places are calculated once.
    """

    def __init__(
        self,
        kernel: TiledProduct,
        buffers: tuple[Buffer, ...],
        product: Expr,
        first: tuple[Expr, Expr],
        thread: Expr,
    ) -> None:
        tile, threads = kernel.tile, kernel.threads
        self.kernel, self.buffers, self.product, self.first = kernel, buffers, product, first
        self.row = T.bind(T.floormod(thread, tile.rows))
        self.column = T.bind(T.floormod(thread, tile.columns))
        self.left_word = T.bind(T.floordiv(thread, tile.rows))
        self.right_word = T.bind(T.floordiv(thread, tile.columns))
        self.left_step, self.right_step = threads // tile.rows, threads // tile.columns
        self.known = kernel.column(product, T.bind(first[1] + self.column))

    def emit_left(self, start: Expr, line: Buffer) -> None:
        """Words of the left operand from `start` on."""
        for offset in range(0, self.kernel.tile.step, self.left_step):
            word = self.left_word + offset
            place = (self.product, self.first[0] + self.row, start + word)
            store(line, [word, self.row], self.kernel.left(self.buffers, place))

    def emit_right(self, start: Expr, line: Buffer) -> None:
        """Words of the right operand from `start` on."""
        for offset in range(0, self.kernel.tile.step, self.right_step):
            word = self.right_word + offset
            value = self.kernel.right(self.buffers, self.known, T.bind(start + word))
            store(line, [word, self.column], value)
