"""Fully connected layers with ternary weights, kept as two bits a weight.

``y = p * (sum of the inputs with code 1) + n * (sum of those with code -1) + bias``: a row has its
own two values and no weight is multiplied. Both sums add up sums of a few inputs that `subset_sums`
has computed for all outputs at once: ``vpermps`` takes any of 8 floats (16 with AVX-512) by an
index in every lane, and that index is the codes of three (four) neighbouring inputs. An instruction
ignores the bits above its index, so three inputs take two shifts, two permutations and two
additions.
"""

from dataclasses import dataclass, replace

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.codebook_linear import permuted
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
from shohin.backends.tvm.kernels.epilogue import operand_parameters
from shohin.backends.tvm.kernels.indexed_linear import Rows
from shohin.backends.tvm.kernels.matmul import MatrixTile
from shohin.backends.tvm.kernels.subset_sums import SubsetForm
from shohin.backends.tvm.kernels.tiled_linear import TiledEmitter, TiledLinear

_PLANES = 2
"""Sums of an output: of what is added, and of what is subtracted."""


@dataclass(frozen=True)
class TernaryLinear(TiledLinear):
    """``y = steps(x @ w.T + bias)`` with the subset sums of ``x`` ``[M, K]`` and ``y`` ``[M, N]``.

    Codes are packed ``[N/NR, words, NR]``, little-endian words as `SubsetForm` has them. Any word
    is valid. They are bytes to everyone else, as those of `CodebookLinear`.

    Attributes:
        form: tables and packing.
        tile: sums; no splits.
    """

    form: SubsetForm

    @property
    def family(self) -> str:
        """``ternary_linear``."""
        return "ternary_linear"

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The layer in every tile shape whose sums fit the registers."""
        options = ternary_tile_options(self.rows, self.columns, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Rows times column blocks."""
        return f"{self.tile.rows}x{self.tile.column_blocks}"

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Shape of the bytes of the words."""
        return (self.column_tiles, self.form.words(self.depth), 4 * self.tile_columns)

    def parameters(self) -> tuple[Parameter, ...]:
        """Tables, words of codes, both values of each column, bias, step operands, rows."""
        result = (self.rows, self.columns)
        return (
            Parameter("tables", self.form.shape(self.rows, self.depth)),
            Parameter("codes", self.code_shape, "uint8"),
            Parameter("values", (_PLANES, self.padded_columns)),
            Parameter("bias", (self.padded_columns,)),
            *operand_parameters(self.steps, result, self.padded_columns),
            Parameter("y", result),
        )

    def emitter(self, item: Expr, buffers: tuple[Buffer, ...]) -> TiledEmitter:
        """What emits the tile of a work item."""
        return _TileEmitter(self, item, buffers)

    def pack(self, codes: Rows) -> Array:
        """Codes as words, done a tile at a time.

        Args:
            codes: gives the codes of some outputs; 1, 0 and -1 of any type.
        """
        form = self.form
        tiles, words, _ = self.code_shape
        packed = np.zeros((tiles, words, self.tile_columns), np.uint32)
        for tile in range(tiles):
            start = tile * self.tile_columns
            given = codes(start, min(start + self.tile_columns, self.columns))
            full = np.zeros((self.tile_columns, words * form.inputs), np.int8)
            full[: given.shape[0], : self.depth] = given
            packed[tile] = form.pack(full)
        return packed.view(np.uint8)


class _TileEmitter(TiledEmitter):
    """Adds up the sums of a tile that codes choose."""

    def __init__(self, kernel: TernaryLinear, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.subsets, self.codes, self.values, *rest = buffers
        super().__init__(kernel, item, tuple(rest))
        self.kernel, self.lanes = kernel, kernel.form.lanes

    def emit(self, rows: int, columns: int) -> None:
        """A tile of `rows` by `columns` results."""
        kernel, lanes, count = self.kernel, self.lanes, blocks(columns)
        vectors = count * LANES // lanes
        sums = local(rows * _PLANES * count * LANES)
        for index in range(rows * _PLANES * vectors):
            store(sums, [ramp(index * lanes, lanes)], number(0.0, lanes))
        with T.serial(0, kernel.form.words(kernel.depth)) as word:
            self._accumulate(sums, word, rows, vectors)
        for row in range(rows):
            for block in range(count):
                column = ramp(self.column(block))
                added, subtracted = (
                    sums[ramp(((row * _PLANES + plane) * count + block) * LANES)]
                    * self.values[plane, column]
                    for plane in range(_PLANES)
                )
                self.finish(added + subtracted, row, block, columns)

    def _accumulate(self, sums: Buffer, word: Expr, rows: int, vectors: int) -> None:
        """Add the sums that a word chooses, in every vector of columns."""
        form, lanes = self.kernel.form, self.lanes
        words = [held(self._word(word, vector), lanes, "int32") for vector in range(vectors)]
        for group in range(form.groups):
            for row in range(rows):
                table = held(self.subsets[self.row(row), word, group, ramp(0, lanes)], lanes)
                for vector in range(vectors):
                    for plane in range(_PLANES):
                        low = group * form.bits + plane * form.group
                        index = words[vector]
                        if low:
                            index = T.shift_right(index, splat(T.int32(low), lanes))
                        at = ramp(((row * _PLANES + plane) * vectors + vector) * lanes, lanes)
                        store(sums, [at], sums[at] + permuted(table, index, lanes))

    def _word(self, word: Expr, vector: int) -> Expr:
        size = 4 * self.lanes
        read = self.codes[self.column_tile, word, ramp(vector * size, size)]
        return T.reinterpret(f"int32x{self.lanes}", read)


def ternary_tile_options(rows: int, columns: int, registers: int) -> list[MatrixTile]:
    """Tiles whose sums and words fit the registers, cheapest first.

    Args:
        rows: M.
        columns: N.
        registers: vectors of 16 floats that registers hold.
    """
    tiles = set()
    for count in range(1, min(8, blocks(columns)) + 1):
        most = (registers - count) // (_PLANES * count)
        if most > 0:
            tiles.add(MatrixTile(ceil_div(rows, ceil_div(rows, most)), count))
    return sorted(tiles, key=lambda tile: (-tile.rows * tile.column_blocks, repr(tile)))
