"""Weights as tiled products read them: words of a left operand, each form with its packing."""

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import device_call
from shohin.backends.tvm.cuda.kernels.tiles import Tile
from shohin.backends.tvm.kernels.emit import Array, Buffer, Expr, Parameter, ceil_div

WeightForm: TypeAlias = Literal["float", "bytes", "ternary-float", "ternary-bytes"]

CODES = 16
"""Codes of two bits in a word."""

_NIBBLES = 0x3333
"""Where four codes are in half a word: in nibbles, as `__byte_perm` selects bytes by."""


def code_shift(element: Any) -> Any:
    """Where a word has the code of one of its 16 elements, a number or an expression.

    Four neighbouring elements are in nibbles of one half, so that one `__byte_perm` makes four
    bytes of them.
    """
    group, member = element // 4, element % 4
    return 4 * member + 16 * (group % 2) + 2 * (group // 2)


def pack_codes(codes: Array) -> Array:
    """Ternary codes to words.

    Args:
        codes: int8 ``[rows, depth]``: 1, 0 and -1; `depth` is a multiple of 16.

    Returns:
        int32 ``[rows, depth / 16]``: 1 for 1, 2 for -1, each two bits.
    """
    words = np.zeros((codes.shape[0], codes.shape[1] // CODES), np.uint32)
    fields = np.array([0, 1, 2], np.uint32)[codes.astype(np.int64)]
    fields = fields.reshape(*words.shape, CODES)
    for element in range(CODES):
        words |= fields[:, :, element] << np.uint32(code_shift(element))
    return words.view(np.int32)


def byte_tables(pairs: Array) -> Array:
    """What codes 0, 1 and 2 stand for, as three bytes of a word.

    Args:
        pairs: integers ``[rows, 2]``: what 1 and -1 stand for.
    """
    bytes_ = np.zeros((len(pairs), 4), np.int8)
    bytes_[:, 1:3] = pairs
    return bytes_.view(np.int32).reshape(-1)


def byte_words(weight: Array) -> Array:
    """int8 ``[rows, depth]`` to int32 ``[rows, ceil(depth / 4)]``, zeros behind."""
    padded = np.zeros((weight.shape[0], ceil_div(weight.shape[1], 4) * 4), np.int8)
    padded[:, : weight.shape[1]] = weight
    return padded.view(np.int32)


def four_bytes(codes: Expr, group: Expr, table: Expr) -> Expr:
    """Four weights of one byte each.

    Args:
        codes: a word of codes.
        group: which four of its elements, 0 to 3.
        table: what `byte_tables` gave for the row.
    """
    moved = T.shift_right(codes, code_shift(group * 4))
    selected = T.bitwise_and(moved, T.int32(_NIBBLES))
    return device_call("int32", "__byte_perm", table, T.int32(0), T.reinterpret("uint32", selected))


@dataclass(frozen=True)
class Weights:
    """The left operand of a product.

    Attributes:
        form: how weights are kept.
        products: groups of a convolution, else 1.
        rows: of each product.
        depth: weights of a row.
        tile: that rows and depth are padded for.
    """

    form: WeightForm
    products: int
    rows: int
    depth: int
    tile: Tile

    @property
    def words(self) -> int:
        """Words of a row as the product takes them."""
        return ceil_div(self.depth, 4) if self.form.endswith("bytes") else self.depth

    @property
    def _padded(self) -> tuple[int, int]:
        rows = ceil_div(self.rows, self.tile.rows) * self.tile.rows
        words = ceil_div(self.words, self.tile.step) * self.tile.step
        return rows, words

    @property
    def _code_words(self) -> int:
        elements = self._padded[1] * (4 if self.form == "ternary-bytes" else 1)
        return ceil_div(elements, CODES)

    def parameters(self) -> tuple[Parameter, ...]:
        """The packed weights; of ternary ones the codes, and what they stand for."""
        rows, words = self._padded
        if self.form == "float":
            return (Parameter("w", (self.products, words, rows)),)
        if self.form == "bytes":
            return (Parameter("w", (self.products, words, rows), "int32"),)
        codes = Parameter("w", (self.products, self._code_words, rows), "int32")
        if self.form == "ternary-float":
            return codes, Parameter("values", (self.products, rows, 2))
        return codes, Parameter("table", (self.products, rows), "int32")

    def word(self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr]) -> Expr:
        """A word of the operand.

        Args:
            buffers: of `parameters`.
            place: product, row, word.
        """
        product, row, word = place
        if not self.form.startswith("ternary"):
            return buffers[0][product, word, row]
        codes, values = buffers
        if self.form == "ternary-bytes":
            code = T.bind(codes[product, T.floordiv(word, 4), row])
            return four_bytes(code, T.floormod(word, 4), values[product, row])
        shift = code_shift(T.bind(T.floormod(word, CODES)))
        code = T.shift_right(codes[product, T.floordiv(word, CODES), row], shift)
        code = T.bind(T.bitwise_and(code, T.int32(3)))
        negative = T.Select(code == 2, values[product, row, 1], T.float32(0))
        return T.Select(code == 1, values[product, row, 0], negative)

    def pack(self, weight: Array) -> Array:
        """The weights, or their codes, as the kernel reads them.

        Args:
            weight: ``[products * rows, ...]``: numbers, or codes 1, 0 and -1.
        """
        flat = weight.reshape(self.products, self.rows, math.prod(weight.shape[1:]))
        return np.stack([self._pack_one(product) for product in flat])

    def _pack_one(self, weight: Array) -> Array:
        rows, words = self._padded
        if self.form == "float":
            packed = weight
        elif self.form == "bytes":
            packed = byte_words(weight)
        else:
            full = np.zeros((len(weight), self._code_words * CODES), np.int8)
            full[:, : weight.shape[1]] = weight
            packed, words = pack_codes(full), self._code_words
        result = np.zeros((words, rows), packed.dtype)
        result[: packed.shape[1], : packed.shape[0]] = packed.T
        return result

    def pack_values(self, pairs: Array) -> Array:
        """What codes stand for, as the kernel reads it.

        Args:
            pairs: ``[products * rows, 2]``: what 1 and -1 stand for.
        """
        rows = self._padded[0]
        full = np.zeros((self.products, rows, 2), pairs.dtype)
        full[:, : self.rows] = pairs.reshape(self.products, self.rows, 2)
        if self.form == "ternary-float":
            return full
        return byte_tables(full.reshape(-1, 2)).reshape(self.products, rows)
