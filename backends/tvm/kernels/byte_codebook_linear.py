"""Fully connected layers whose weights are few different values, on processors that look up bytes.

What `codebook_linear` does where an instruction orders floats, done by instructions that order
bytes. A value of the table is four bytes, and its first ones lie together in a register, as do its
second, third and fourth ones: of sixteen neighbouring outputs, four look-ups give all bytes, and
interleaving them gives sixteen floats.

Indices share a byte, or two where that wastes less.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.byte_tables import MOST_REGISTERS, REGISTER, TableName, look_up
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

_PLANES = 4
"""Bytes of a value."""


@dataclass(frozen=True)
class ByteForm:
    """Indices, and how a table of values lies in registers.

    Attributes:
        bits: width of an index.
        name: the instruction that looks bytes up.
    """

    bits: int
    name: TableName

    @classmethod
    def of(cls, values: Array, name: TableName) -> "ByteForm":
        """The form for different values."""
        return cls(max(1, (values.size - 1).bit_length()), name)

    @property
    def word_bytes(self) -> int:
        """Bytes of a word: the number that leaves fewer bits unused."""
        return 2 if 8 % self.bits > 16 % self.bits else 1

    @property
    def per_word(self) -> int:
        """Indices of a word."""
        return 8 * self.word_bytes // self.bits

    @property
    def tables(self) -> int:
        """Registers of each of the four bytes of the values."""
        return ceil_div(1 << self.bits, REGISTER)

    @property
    def exists(self) -> bool:
        """Whether there is a kernel for it."""
        return self.tables <= MOST_REGISTERS[self.name]

    def indices(self, values: Array, weight: Array) -> NDArray[np.uint32]:
        """The index of every weight; all are among the values."""
        return np.searchsorted(np.unique(values), weight).astype(np.uint32)

    def table(self, values: Array) -> NDArray[np.uint8]:
        """The bytes of the values, all first ones before all second ones."""
        entries = np.zeros(REGISTER * self.tables, np.float32)
        entries[: values.size] = np.unique(values)
        planes: NDArray[np.uint8] = entries.view(np.uint8).reshape(-1, _PLANES).T
        return planes.reshape(-1).copy()


@dataclass(frozen=True)
class ByteCodebookLinear(IndexedLinear):
    """A layer that looks its weights up byte by byte.

    Attributes:
        form: indices and table.
    """

    form: ByteForm

    @property
    def family(self) -> str:
        """``byte_codebook_linear``."""
        return "byte_codebook_linear"

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The layer in every tile shape whose sums fit the registers."""
        options = byte_tile_options(self.rows, self.columns, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def table_parameter(self) -> Parameter:
        """The bytes of the values."""
        return Parameter("table", (_PLANES * REGISTER * self.form.tables,), "uint8")

    def emitter(self, item: Expr, buffers: tuple[Buffer, ...]) -> TiledEmitter:
        """What emits the tile of a work item."""
        return _TileEmitter(self, item, buffers)


class _TileEmitter(TiledEmitter):
    """Looks the weights of a tile up."""

    def __init__(self, kernel: ByteCodebookLinear, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.x, self.index, table, *rest = buffers
        super().__init__(kernel, item, tuple(rest))
        self.kernel, self.form = kernel, kernel.form
        starts = range(0, _PLANES * REGISTER * kernel.form.tables, REGISTER)
        registers = [
            held(T.reinterpret(f"int8x{REGISTER}", table[ramp(start, REGISTER)]), REGISTER, "int8")
            for start in starts
        ]
        count = kernel.form.tables
        self.planes = [registers[i * count : (i + 1) * count] for i in range(_PLANES)]

    def emit(self, rows: int, columns: int) -> None:
        """A tile of `rows` by `columns` results."""
        kernel, count = self.kernel, blocks(columns)
        splits = kernel.tile.splits
        sums = local(splits * rows * count * LANES)
        for index in range(splits * rows * count):
            store(sums, [ramp(index * LANES)], number(0.0))
        whole, rest = divmod(kernel.depth, self.form.per_word)

        def at(split: int, row: int, block: int) -> Expr:
            return ramp(((split * rows + row) * count + block) * LANES)

        def accumulate(word: Expr, inputs: int) -> None:
            for block in range(count):
                words = self._words(word, block)
                for place in range(inputs):
                    weight = held(self._weights(words, place), LANES)
                    k = word * self.form.per_word + place
                    for row in range(rows):
                        where = at(place % splits, row, block)
                        product = splat(self.x[self.row(row), k], LANES) * weight
                        store(sums, [where], sums[where] + product)

        with T.serial(0, whole) as word:
            accumulate(word, self.form.per_word)
        if rest:
            accumulate(whole, rest)
        for row in range(rows):
            for block in range(count):
                parts = [sums[at(split, row, block)] for split in range(splits)]
                self.finish(sum(parts[1:], parts[0]), row, block, columns)

    def _words(self, word: Expr, block: int) -> Expr:
        """The indices of sixteen columns for the inputs of a word."""
        size = self.form.word_bytes * LANES
        read = self.index[self.column_tile, word, ramp(block * size, size)]
        kind = f"int{8 * self.form.word_bytes}"
        return held(T.reinterpret(f"{kind}x{LANES}", read), LANES, kind)

    def _weights(self, words: Expr, place: int) -> Expr:
        """Sixteen weights of an input."""
        kind = f"int{8 * self.form.word_bytes}"
        low = place * self.form.bits
        unsigned = T.reinterpret(f"u{kind}x{LANES}", words)
        shifted = (
            T.shift_right(unsigned, splat(_typed(f"u{kind}", low), LANES)) if low else unsigned
        )
        mask = splat(_typed(f"u{kind}", (1 << self.form.bits) - 1), LANES)
        index = T.bind(T.cast(T.bitwise_and(shifted, mask), f"int8x{LANES}"))
        found = [T.bind(look_up(self.form.name, plane, index)) for plane in self.planes]
        low_halves, high_halves = (
            T.reinterpret(f"int16x{LANES}", _interleaved(pair)) for pair in (found[:2], found[2:])
        )
        return T.reinterpret(
            f"float32x{LANES}", _interleaved([T.bind(low_halves), T.bind(high_halves)])
        )


def _interleaved(pair: list[Expr]) -> Expr:
    """Elements of two vectors of sixteen, in turn."""
    return tirx.Shuffle(pair, [i + j for i in range(LANES) for j in (0, LANES)])


def _typed(kind: str, value: int) -> Expr:
    return tirx.IntImm(kind, value)


def byte_tile_options(rows: int, columns: int, registers: int) -> list[MatrixTile]:
    """Tiles whose sums fit the registers, likeliest fastest first.

    Args:
        rows: M.
        columns: N.
        registers: vectors of 16 floats that registers hold.
    """
    free = max(1, registers - 2)  # Bytes of the table, and the weights that are looked up.
    tiles = set()
    for count in range(1, max(1, min(4, blocks(columns), free)) + 1):
        height = ceil_div(rows, ceil_div(rows, max(1, free // count)))
        splits = [s for s in (1, 2) if s * height * count <= free] or [1]
        tiles |= {MatrixTile(height, count, s) for s in splits}
    return sorted(tiles, key=lambda tile: (-tile.rows, -tile.splits, tile.column_blocks))
