"""Fully connected layers whose weights are few different values, kept as indices of a table.

Weight sharing (Deep Compression, arXiv 1510.00149) leaves a layer with a handful of values. One row
is bound by streaming the weights, so the kernel streams indices, four to thirty-two times fewer
bytes, and looks the values up in a table that lies in registers: ``vpermps`` takes any of 16 floats
by an index in every lane (8 on AVX2), ``vpermi2ps`` any of 32. A 32-bit word holds the indices of
one output for as many neighbouring inputs as fit; an instruction ignores the bits above its
index, so that getting at one is a shift and no mask.

Processors whose instructions order bytes only, ARM and those before AVX2, have the kernel of
`byte_codebook_linear`.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels import vector_math as vm
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
    number,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.indexed_linear import IndexedLinear
from shohin.backends.tvm.kernels.matmul import MatrixTile
from shohin.backends.tvm.kernels.tiled_linear import TiledEmitter

_WORD = 32
"""Bits of a word."""

_MOST_TABLES = 4
"""Registers of values: more of them take longer to choose from than weights to stream."""


@dataclass(frozen=True)
class TableForm:
    """Indices, and how a table of values lies in registers.

    Attributes:
        bits: width of an index.
        lanes: floats of a register, 16 or 8.
        zero_bit: whether the highest bit of an index says that the value is not zero: one more
            value without another table.
    """

    bits: int
    lanes: int
    zero_bit: bool = False

    @classmethod
    def of(cls, values: Array, lanes: int) -> "TableForm":
        """The form with the fewest look-ups, and of those the narrowest indices.

        Args:
            values: different from each other.
            lanes: floats of a register.
        """
        plain = cls(max(1, (values.size - 1).bit_length()), lanes)
        masked = cls(max(1, (values.size - 2).bit_length()) + 1, lanes, zero_bit=True)
        return masked if 0 in values and masked.look_ups < plain.look_ups else plain

    @property
    def per_word(self) -> int:
        """Indices of a word."""
        return _WORD // self.bits

    @property
    def word_bytes(self) -> int:
        """Bytes of a word."""
        return _WORD // 8

    @property
    def entries(self) -> int:
        """Values in the table, unused ones included."""
        return 1 << (self.bits - self.zero_bit)

    @property
    def tables(self) -> int:
        """Registers of values."""
        return ceil_div(self.entries, self.lanes)

    @property
    def look_ups(self) -> int:
        """Permutations for the values of a register of indices."""
        return ceil_div(self.tables, 2) if self.lanes == LANES else self.tables

    @property
    def exists(self) -> bool:
        """Whether there is a kernel for it."""
        return self.tables <= _MOST_TABLES

    def table(self, values: Array) -> Array:
        """Values in registers, repeated where fewer than fill one.

        The bits above an index, which an instruction may read, then make no difference.
        """
        ordered = self._order(values)
        entries = np.zeros(self.entries, np.float32)
        entries[: ordered.size] = ordered
        return np.resize(entries, self.tables * self.lanes)

    def indices(self, values: Array, weight: Array) -> NDArray[np.uint32]:
        """The index of every weight; all are among the values. That of zero is 0."""
        ordered = self._order(values)
        ascending = np.argsort(ordered)
        rank = np.searchsorted(ordered, weight, sorter=ascending)
        index = np.append(ascending, 0)[rank].astype(np.uint32)
        return np.where(weight != 0, index + self.entries, 0) if self.zero_bit else index

    def _order(self, values: Array) -> Array:
        """Values by index: zero first, unless a bit of its own says that."""
        others = np.unique(values[values != 0])
        has_zero = others.size < np.unique(values).size and not self.zero_bit
        return np.append(np.zeros(int(has_zero), np.float32), others)


@dataclass(frozen=True)
class CodebookLinear(IndexedLinear):
    """A layer that looks its weights up by orders of floats.

    Attributes:
        form: indices and table.
    """

    form: TableForm

    @property
    def family(self) -> str:
        """``codebook_linear``."""
        return "codebook_linear"

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The layer in every tile shape that fits the registers beside the table."""
        options = codebook_tile_options(self.form, self.rows, self.columns, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def table_parameter(self) -> Parameter:
        """Values in registers."""
        return Parameter("table", (self.form.tables * self.form.lanes,))

    def emitter(self, item: Expr, buffers: tuple[Buffer, ...]) -> TiledEmitter:
        """What emits the tile of a work item."""
        return _TileEmitter(self, item, buffers)


class _TileEmitter(TiledEmitter):
    """Looks the weights of a tile up."""

    def __init__(self, kernel: CodebookLinear, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.x, self.index, table, *rest = buffers
        super().__init__(kernel, item, tuple(rest))
        self.kernel = kernel
        lanes, count = kernel.form.lanes, kernel.form.tables
        self.tables = [held(table[ramp(i * lanes, lanes)], lanes) for i in range(count)]

    def emit(self, rows: int, columns: int) -> None:
        """A tile of `rows` by `columns` results."""
        kernel = self.kernel
        vectors = blocks(columns) * LANES // kernel.form.lanes
        sums = _Sums(rows, vectors, kernel.tile.splits, kernel.form.lanes)
        whole, rest = divmod(kernel.depth, kernel.form.per_word)
        with T.serial(0, whole) as word:
            self._accumulate(sums, word, kernel.form.per_word)
        self._accumulate(sums, whole, rest)
        for row in range(rows):
            for block in range(blocks(columns)):
                self.finish(sums.block_total(row, block), row, block, columns)

    def _accumulate(self, sums: "_Sums", word: Expr, inputs: int) -> None:
        """Add the products of the first inputs of a word."""
        kernel, lanes = self.kernel, self.kernel.form.lanes
        words = []
        for vector in range(sums.vectors if inputs else 0):
            words.append(local(lanes, "int32"))
            size = _WORD // 8 * lanes
            read = self.index[self.column_tile, word, ramp(vector * size, size)]
            store(words[-1], [ramp(0, lanes)], T.reinterpret(f"int32x{lanes}", read))
        for place in range(inputs):
            k = word * kernel.form.per_word + place
            for vector in range(sums.vectors):
                weight = held(self._look_up(words[vector][ramp(0, lanes)], place), lanes)
                for row in range(sums.rows):
                    sums.add(place, row, vector, splat(self.x[self.row(row), k], lanes) * weight)

    def _look_up(self, word: Expr, place: int) -> Expr:
        """The values of the indices at a place of words."""
        form = self.kernel.form
        low = place * form.bits
        index = T.shift_right(word, splat(T.int32(low), form.lanes)) if low else word
        found = _permute(self.tables, index, form.lanes)
        bit = low + form.bits - form.zero_bit - (len(found) - 1).bit_length()
        while len(found) > 1:
            pairs = zip(found[::2], found[1::2], strict=True)
            found = [T.Select(_is_set(word, bit), high, low) for low, high in pairs]
            bit += 1
        return (
            T.Select(_is_set(word, bit), found[0], number(0.0, form.lanes))
            if form.zero_bit
            else found[0]
        )


class _Sums:
    """Sums of a tile in registers: splits times rows times vectors."""

    def __init__(self, rows: int, vectors: int, splits: int, lanes: int) -> None:
        self.rows, self.vectors, self.splits, self.lanes = rows, vectors, splits, lanes
        self.numbers = local(splits * rows * vectors * lanes)
        for split in range(splits):
            for row in range(rows):
                for vector in range(vectors):
                    store(self.numbers, [self._at(split, row, vector)], number(0.0, lanes))

    def _at(self, split: int, row: int, vector: int) -> Expr:
        return ramp(((split * self.rows + row) * self.vectors + vector) * self.lanes, self.lanes)

    def add(self, place: int, row: int, vector: int, product: Expr) -> None:
        """Add to the sum that products of a place in words go to."""
        at = self._at(place % self.splits, row, vector)
        store(self.numbers, [at], self.numbers[at] + product)

    def block_total(self, row: int, block: int) -> Expr:
        """The sums of sixteen columns."""
        total = local(LANES)
        for part in range(LANES // self.lanes):
            vector = block * (LANES // self.lanes) + part
            parts = [self.numbers[self._at(s, row, vector)] for s in range(self.splits)]
            store(total, [ramp(part * self.lanes, self.lanes)], sum(parts[1:], parts[0]))
        return total[ramp(0)]


def _permute(tables: list[Expr], index: Expr, lanes: int) -> list[Expr]:
    """What the lowest bits of indices choose from each table or pair of tables."""
    if lanes != LANES or len(tables) == 1:
        return [permuted(table, index, lanes) for table in tables]
    pairs = zip(tables[::2], tables[1::2], strict=True)
    name = "llvm.x86.avx512.vpermi2var.ps.512"
    return [_intrinsic(name, low, index, high, lanes=lanes) for low, high in pairs]


def permuted(table: Expr, index: Expr, lanes: int) -> Expr:
    """What the lowest bits of indices choose from a register of 8 or 16 floats."""
    name = "llvm.x86.avx512.permvar.sf.512" if lanes == LANES else "llvm.x86.avx2.permps"
    return _intrinsic(name, table, index, lanes=lanes)


def _intrinsic(name: str, *arguments: Expr, lanes: int) -> Expr:
    return T.call_llvm_pure_intrin(f"float32x{lanes}", name, *arguments)


def _is_set(word: Expr, bit: int) -> Expr:
    """In which lanes a bit is set."""
    mask = int(np.uint32(1 << bit).view(np.int32))
    lanes = vm.lanes_of(word)
    return T.bitwise_and(word, splat(T.int32(mask), lanes)) != splat(T.int32(0), lanes)


def codebook_tile_options(
    form: TableForm, rows: int, columns: int, registers: int
) -> list[MatrixTile]:
    """Tiles whose sums fit the registers, cheapest first by the cost model.

    Args:
        form: indices and table.
        rows: M.
        columns: N.
        registers: vectors of 16 floats that registers hold: table, words and sums.
    """
    free = registers - ceil_div(form.tables * form.lanes, LANES)
    tiles = set()
    for count in range(1, max(1, min(8, blocks(columns), free // 2)) + 1):
        most = max(1, (free - count) // count)
        height = ceil_div(rows, ceil_div(rows, most))
        splits = [s for s in (1, 2, 4) if s * height <= most] or [1]
        tiles |= {MatrixTile(height, count, s) for s in splits}
    return sorted(tiles, key=lambda tile: (_tile_cost(form, tile, rows), repr(tile)))


def choose_codebook_tile(form: TableForm, rows: int, columns: int, registers: int) -> MatrixTile:
    """The cheapest of `codebook_tile_options`."""
    return codebook_tile_options(form, rows, columns, registers)[0]


def _tile_cost(form: TableForm, tile: MatrixTile, rows: int) -> float:
    """Cycles of an input per result: look-ups, sums, latency of few sums, input values."""
    look_up = 1 + form.look_ups + form.zero_bit
    latency = 4.0 / tile.splits
    cycles = max(latency, tile.column_blocks * (look_up + tile.rows)) + 0.5 * tile.rows
    return (cycles + 0.1 * tile.splits) * ceil_div(rows, tile.rows) / tile.column_blocks
