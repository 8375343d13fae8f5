"""Fully connected layers whose weights are indices of a table of values, packed into words."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.emit import Array, Parameter, ceil_div
from shohin.backends.tvm.kernels.epilogue import operand_parameters
from shohin.backends.tvm.kernels.tiled_linear import TiledLinear

Rows = Callable[[int, int], Array]
"""Weights ``[stop - start, K]`` of the outputs from `start` to before `stop`."""


class IndexForm(Protocol):
    """How indices are packed."""

    @property
    def bits(self) -> int:
        """Width of an index."""

    @property
    def per_word(self) -> int:
        """Indices of a word."""

    @property
    def word_bytes(self) -> int:
        """Bytes of a word: 1, 2 or 4."""

    def indices(self, values: Array, weight: Array) -> NDArray[np.uint32]:
        """The index of every weight; all are among the values."""


@dataclass(frozen=True)
class IndexedLinear(TiledLinear):
    """``y = steps(x @ table[index].T + bias)`` with ``x`` ``[M, K]`` and ``y`` ``[M, N]``.

    Indices are packed ``[N/NR, K/P, NR]``, P of them to a little-endian word, the first in the
    lowest bits. Any word is valid. They are bytes to everyone else: the coder of a binary's
    weights finds more of a pattern in those than in words.

    Attributes:
        form: how indices are packed.
        tile: sums; the splits are those of the indices of a word.
    """

    form: IndexForm

    def tile_text(self) -> str:
        """Rows times column blocks times sums along K."""
        return f"{self.tile.rows}x{self.tile.column_blocks}x{self.tile.splits}"

    @property
    def index_shape(self) -> tuple[int, int, int]:
        """Shape of the bytes of the words."""
        words = ceil_div(self.depth, self.form.per_word)
        return (self.column_tiles, words, self.form.word_bytes * self.tile_columns)

    @abstractmethod
    def table_parameter(self) -> Parameter:
        """The table of values."""

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, words of indices, table, bias, step operands, rows."""
        result = (self.rows, self.columns)
        return (
            Parameter("x", (self.rows, self.depth)),
            Parameter("index", self.index_shape, "uint8"),
            self.table_parameter(),
            Parameter("bias", (self.padded_columns,)),
            *operand_parameters(self.steps, result, self.padded_columns),
            Parameter("y", result),
        )

    def pack(self, values: Array, weight: Rows) -> Array:
        """Weights as words of indices, done a tile at a time.

        Args:
            values: every value that occurs.
            weight: gives the weights of some outputs.
        """
        form = self.form
        kind = np.dtype(f"<u{form.word_bytes}")
        tiles, words, _ = self.index_shape
        packed = np.zeros((tiles, words, self.tile_columns), kind)
        for tile in range(tiles):
            start = tile * self.tile_columns
            rows = weight(start, min(start + self.tile_columns, self.columns))
            index = np.zeros((self.tile_columns, words * form.per_word), kind)
            index[: rows.shape[0], : self.depth] = form.indices(values, rows)
            parts = index.reshape(self.tile_columns, words, form.per_word)
            for place in range(form.per_word):
                packed[tile] |= parts[:, :, place].T << kind.type(place * form.bits)
        return packed.view(np.uint8)
