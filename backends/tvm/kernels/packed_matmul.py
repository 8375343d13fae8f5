"""Matrix products with ternary weights, kept as two bits a weight: for any processor and any rows.

The same as `MatMul` but for where weights come from: they are expanded from their codes in
registers; or, where the rows of the result take more than one tile, once for those of a work item
into a scratch that a second level cache keeps.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    ceil_div,
    held,
    local,
    ramp,
    store,
)
from shohin.backends.tvm.kernels.indexed_linear import Rows
from shohin.backends.tvm.kernels.matmul import (
    MatMul,
    MatrixTile,
    TileEmitter,
    matrix_tile_options,
)
from shohin.backends.tvm.kernels.ternary_codes import (
    CODES_A_WORD,
    MOST_SCRATCH,
    VALUES,
    decoded,
    load_words,
    pack_codes,
)


@dataclass(frozen=True)
class PackedMatMul(MatMul):
    """A fully connected layer whose outputs have two values each.

    Codes are packed ``[N/NR, K/16, NR]`` words.

    Attributes:
        items: about how many work items there should be, for threads to share.
    """

    items: int = 1

    @property
    def family(self) -> str:
        """``packed_linear``."""
        return "packed_linear"

    @property
    def extent(self) -> int:
        """Column tiles times parts of the rows."""
        return self.column_tiles * self.parts

    @property
    def part_tiles(self) -> int:
        """Tiles of rows of a work item."""
        return ceil_div(self.row_tiles, ceil_div(self.items, self.column_tiles))

    @property
    def parts(self) -> int:
        """Parts of the rows, for each of which the weights are expanded."""
        return ceil_div(self.row_tiles, self.part_tiles)

    @property
    def words(self) -> int:
        """Words of an output."""
        return ceil_div(self.depth, CODES_A_WORD)

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Shape of the bytes of the words."""
        return (self.column_tiles, self.words, 4 * LANES * self.tile.column_blocks)

    @property
    def scratch(self) -> int:
        """Weights that are expanded at once; 0 where they are in registers only."""
        size = self.words * CODES_A_WORD * LANES * self.tile.column_blocks
        return size if self.row_tiles > 1 and 4 * size <= MOST_SCRATCH else 0

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The product in every tile shape, those first that expand in registers and fit them."""

        def rank(tile: MatrixTile) -> tuple[int, int]:
            spilled = tile.rows < self.rows or tile.column_blocks > 1
            return (1, 0) if spilled else (0, tile.splits)

        options = matrix_tile_options(self.rows, self.columns, registers)
        return tuple(replace(self, tile=tile) for tile in sorted(options, key=rank))

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, words of codes, both values of each column, bias if any, step operands, result."""
        a, _, *rest = super().parameters()
        return (
            a,
            Parameter("codes", self.code_shape, "uint8"),
            Parameter("values", (VALUES, self.padded_columns)),
            *rest,
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """A part of the rows of one tile of columns; ragged edges are separate code."""
        # Outside of both branches, each of which would have a part of the stack to itself.
        scratch = local(max(1, self.scratch))
        width = LANES * self.tile.column_blocks
        column_tile, part = T.floordiv(item, self.parts), T.floormod(item, self.parts)
        emit = partial(self._emit_rows, column_tile, part, (scratch, *buffers))
        whole_or_rest(column_tile, width, self.columns, emit)

    def pack(self, codes: Rows) -> Array:
        """Codes as words, done a tile at a time.

        Args:
            codes: gives the codes of some outputs; 1, 0 and -1 of any type.
        """
        width = LANES * self.tile.column_blocks
        packed = np.zeros(self.code_shape, np.uint8)
        for tile in range(self.column_tiles):
            rows = codes(tile * width, min((tile + 1) * width, self.columns))
            full = np.zeros((self.depth, width), np.int8)
            full[:, : rows.shape[0]] = rows.T
            packed[tile] = pack_codes(full)
        return packed

    def _emit_rows(
        self, column_tile: Expr, part: Expr, buffers: tuple[Buffer, ...], columns: int
    ) -> None:
        emitter = _PackedEmitter(self, column_tile, buffers)
        if self.scratch:
            emitter.expand(columns)
        first = part * self.part_tiles
        with T.serial(0, T.min(self.part_tiles, self.row_tiles - first)) as index:
            emitter.row_tile = first + index
            whole_or_rest(
                first + index,
                self.tile.rows,
                self.rows,
                lambda rows: emitter.emit(rows, columns),
            )


class _PackedEmitter(TileEmitter):
    """Takes weights from codes."""

    def __init__(self, matmul: PackedMatMul, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        scratch, a, self.codes, self.values, *rest = buffers
        super().__init__(matmul, item, (a, scratch, *rest))
        self.packed, self.column_tile, self.image = matmul, item, 0
        self.vectors: list[Expr] = []

    def expand(self, columns: int) -> None:
        """Write the weights of a tile of columns to the scratch."""
        with T.serial(0, self.packed.words) as word:
            words = self._words(word, columns)
            for place in range(CODES_A_WORD):
                for block, vector in enumerate(self._decoded(words, place)):
                    store(self.weight, [self._at(word * CODES_A_WORD + place, block)], vector)

    def _sum(self, sums: Buffer, splits: int, rows: int, columns: int) -> None:
        if self.packed.scratch:
            super()._sum(sums, splits, rows, columns)
            return
        whole, rest = divmod(self.packed.depth, CODES_A_WORD)
        with T.serial(0, whole) as word:
            self._add_word(sums, (word, CODES_A_WORD), splits, rows, columns)
        if rest:
            self._add_word(sums, (whole, rest), splits, rows, columns)

    def _add_word(
        self, sums: Buffer, word: tuple[Expr, int], splits: int, rows: int, columns: int
    ) -> None:
        """Add the products of the first so many inputs of a word."""
        number, inputs = word
        words = self._words(number, columns)
        for place in range(inputs):
            self.vectors = self._decoded(words, place)
            k = number * CODES_A_WORD + place
            self._accumulate(sums, k, place % splits, rows, columns)

    def _weight(self, k: Expr, block: int, columns: int) -> Expr:
        return self.weight[self._at(k, block)] if self.packed.scratch else self.vectors[block]

    def _words(self, word: Expr, columns: int) -> list[Expr]:
        """A word of every column, by blocks."""
        return [
            load_words(self.codes, [self.column_tile, word], block)
            for block in range(blocks(columns))
        ]

    def _decoded(self, words: list[Expr], place: int) -> list[Expr]:
        """The weights at a place of words, by blocks."""
        vectors = []
        for block, codes in enumerate(words):
            column = ramp(self._column(block))
            pair = [self.values[index, column] for index in range(VALUES)]
            vectors.append(held(decoded(codes, place, pair), LANES))
        return vectors

    def _at(self, k: Expr, block: int) -> Expr:
        return ramp((k * self.packed.tile.column_blocks + block) * LANES)
