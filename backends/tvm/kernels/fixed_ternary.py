"""Ternary weights of integer layers: two bits each in memory, bytes once they are in registers.

A code is 0 for zero, 1 for the positive integer of its row, 2 for the negative one. Four codes lie
in a byte, and what they stand for is taken out of a table of 16 bytes in a register. Where all rows
have the same two integers, the table is ``table[n]`` of the half bytes ``n``: one table for their
low code, one for their high code, so that a byte needs one shift and two masks. Where rows differ,
four neighbouring rows share a table, and the number of the row stands above the code.

If the integers of all rows are multiples of two small ones, products are formed with these, and
sums are multiplied by a factor of each row: small integers leave room to add more products in 16
bits.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.dots import RAISED, DotUnit
from shohin.backends.tvm.kernels.emit import Array, Expr, held, splat
from shohin.backends.tvm.kernels.vector_math import lanes_of

CODES = 4
"""Codes of a byte."""

CODE_BITS = 2

_LEAST_TABLE = 16
_SWAPPED = np.array([0, 2, 1, 0], np.uint8)
"""Codes of what is above zero for what is below, and the other way round."""
_LOW_CODES, _LOW_HALVES = 0x03030303, 0x0F0F0F0F


@dataclass(frozen=True, eq=False)
class TernaryWeights:
    """Ternary integers.

    Attributes:
        codes: uint8 ``[O, ...]``, 0, 1 and 2.
        values: int64 ``[O, 2]``, what 1 and 2 stand for.
        factors: int64 ``[O]``, what sums of products with `values` are multiplied by; of either
            sign.
    """

    codes: NDArray[np.uint8]
    values: NDArray[np.int64]
    factors: NDArray[np.int64]

    @classmethod
    def of(cls, weight: Array) -> "TernaryWeights | None":
        """Integers ``[O, ...]``; None if a row has two positive ones, or two negative ones."""
        flat = weight.astype(np.int16).reshape(len(weight), -1)
        highest, lowest = flat.max(1, initial=0), flat.min(1, initial=0)
        above, below = flat > 0, flat < 0
        # In 16 bits: this is done to every layer, ternary or not.
        wanted = np.where(above, highest[:, None], np.where(below, lowest[:, None], flat))
        if not np.array_equal(wanted, flat):
            return None
        values = np.stack([highest, lowest], 1).astype(np.int64)
        codes = (above + 2 * below).astype(np.uint8).reshape(weight.shape)
        found = _common_pair(values)
        if found is None:
            return cls(codes, values, np.ones(len(values), np.int64))
        pairs, factors = found
        swapped = (factors < 0).reshape(-1, *[1] * (codes.ndim - 1))
        return cls(np.where(swapped, _SWAPPED[codes], codes), pairs, factors)

    @property
    def largest(self) -> int:
        """The largest absolute value that products are formed with."""
        return int(np.abs(self.values).max(initial=0))

    @property
    def scaled(self) -> bool:
        """Whether any factor is not 1."""
        return bool((self.factors != 1).any())

    def unscaled(self) -> NDArray[np.int8]:
        """What the products are formed with ``[O, ...]``."""
        shape = (-1, *[1] * (self.codes.ndim - 1))
        above, below = (self.values[:, i].reshape(shape) for i in range(2))
        found = np.where(self.codes == 1, above, np.where(self.codes == 2, below, 0))
        return found.astype(np.int8)

    def pairs(self, rows: int) -> NDArray[np.int32]:
        """What codes of a row stand for, four bytes to a number, zeros behind the last row.

        Args:
            rows: length of the result.
        """
        found = np.zeros((rows, 4), np.int8)
        found[: len(self.values), 1:3] = self.values
        return found.view(np.int32).reshape(-1)

    def padded_factors(self, rows: int) -> NDArray[np.int32]:
        """The factors, zeros behind the last row."""
        found = np.zeros(rows, np.int32)
        found[: len(self.factors)] = self.factors
        return found


def _common_pair(
    values: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Two integers that those of all rows are multiples of, and the multiples; None without such.

    A row that lacks one of them, or both, has any multiple of it. Multiples below zero are of the
    same integers, but in the other order: what is above zero is a multiple of what is below.
    """
    full = values[(values != 0).all(1)]
    pair = full[0] // np.gcd(*full[0]) if len(full) else np.array([1, -1])
    ahead, found_ahead = _multiples(values, pair)
    behind, found_behind = _multiples(values, -pair[::-1])
    if not (found_ahead | found_behind).all():
        return None
    factors = np.where(found_ahead, ahead, -behind)
    return np.tile(pair, (len(values), 1)), np.where(factors == 0, 1, factors)


def _multiples(
    values: NDArray[np.int64], pair: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """What each row is as a multiple of a pair, and which rows are multiples."""
    factors = (values // pair).max(1)
    expected = np.where(values != 0, factors[:, None] * pair, 0)
    return factors, (expected == values).all(1)


def most_chained(unit: DotUnit, largest: int) -> int:
    """Groups whose products can be added in 16 bits, whatever the inputs are; at least 1.

    Args:
        unit: the instructions.
        largest: absolute value of any weight.
    """
    pair = 2 * RAISED * max(1, largest)
    return max(1, np.iinfo(np.int16).max // pair) if unit.chains else 1


def packed(codes: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """Four codes to a byte, the first in its lowest bits.

    Args:
        codes: any array.
        axis: of the four codes of a byte; the result has none of it.
    """
    parts = np.moveaxis(codes, axis, 0)
    found = np.zeros(parts.shape[1:], np.uint8)
    for place in range(CODES):
        found |= parts[place] << np.uint8(CODE_BITS * place)
    return found


class RowTables:
    """Expands codes all of whose rows have the same integers, by two tables in registers.

    Args:
        unit: the instructions.
        pair: four bytes of a row, as `TernaryWeights.pairs` gives them.
    """

    def __init__(self, unit: DotUnit, pair: Expr) -> None:
        self._unit = unit
        size = max(_LEAST_TABLE, unit.width)
        low = T.reinterpret(f"int8x{size}", splat(pair, size // 4))
        self._low = held(low, size, "int8")
        # Half bytes 0 to 3 have the high code 0, the next four 1, and so on.
        steps = T.reinterpret(f"int8x{size}", ramp_of_words(size // 4))
        self._high = held(unit.look_up(self._low, steps), size, "int8")

    def expand(self, codes: Expr, place: int) -> Expr:
        """A register of weights.

        Args:
            codes: bytes, as many as a register has elements.
            place: which of the four codes of every byte.
        """
        words = _words(codes)
        half = _masked(_shifted(words, CODES * (place // 2)), _LOW_HALVES)
        return self._unit.look_up(self._high if place % 2 else self._low, _as_bytes(half))


def expand_by_lane(unit: DotUnit, pairs: Expr, codes: Expr, place: int) -> Expr:
    """A register of weights whose lanes are rows with integers of their own.

    Args:
        unit: the instructions.
        pairs: int32 lanes, as `TernaryWeights.pairs` gives them.
        codes: bytes, as many as a register has elements.
        place: which of the four codes of every byte.
    """
    table = T.reinterpret(f"int8x{4 * unit.lanes}", pairs)
    # The number of a lane above its code; instructions take it modulo four.
    step = T.int32(0x04040404) if unit.group == CODES else T.int16(0x0404)
    zero = T.int32(0) if unit.group == CODES else T.int16(0)
    rows = T.reinterpret(f"int32x{unit.width // 4}", T.ramp(zero, step, unit.lanes))
    low = _masked(_shifted(_words(codes), CODE_BITS * place), _LOW_CODES)
    return unit.look_up(table, _as_bytes(T.bitwise_or(low, rows)))


def ramp_of_words(count: int) -> Expr:
    """Four bytes 0, four bytes 1, and so on, as int32 lanes."""
    return T.ramp(T.int32(0), T.int32(0x01010101), count)


def _words(codes: Expr) -> Expr:
    return T.reinterpret(f"int32x{lanes_of(codes) // 4}", codes)


def _as_bytes(words: Expr) -> Expr:
    return T.reinterpret(f"int8x{4 * lanes_of(words)}", words)


def _shifted(words: Expr, bits: int) -> Expr:
    return T.shift_right(words, splat(T.int32(bits), lanes_of(words))) if bits else words


def _masked(words: Expr, mask: int) -> Expr:
    return T.bitwise_and(words, splat(T.int32(mask), lanes_of(words)))
