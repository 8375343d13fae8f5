"""Several symbols that share one Huffman code.

A code has at least one bit, which is more than a symbol of a small alphabet needs where one of them
is far more frequent than the others. Groups of 2, 4 or 8 symbols that take 8 bits at most come as
close to the entropy as those of large alphabets.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shohin.errors import SpecError
from shohin.ir.coding import huffman
from shohin.ir.coding.entropy import entropy_bits
from shohin.ir.packing import pack_bits, unpack_bits

_TABLE_BITS = 4
_MOST_BITS = 8
_CLOSE = 1.01
"""So many times the entropy need no groups."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class _Grouped:
    """Symbols in groups, and the lengths of the groups' codes."""

    groups: Bytes
    size: int
    lengths: Bytes

    @classmethod
    def of(cls, symbols: Bytes, alphabet: int, size: int) -> "_Grouped":
        groups = _join(symbols, alphabet, size)
        counts = np.bincount(groups, minlength=_entries(alphabet, size))
        return cls(groups, size, huffman.code_lengths(counts))

    @property
    def bits(self) -> int:
        """Of the table and the stream."""
        counts = np.bincount(self.groups, minlength=self.lengths.size)
        return int(counts @ self.lengths.astype(np.int64)) + _TABLE_BITS * self.lengths.size

    @property
    def can_be_told(self) -> bool:
        """Whether there is a stream: a group alone has none, from which its symbols could come."""
        return self.size == 1 or int(np.count_nonzero(self.lengths)) > 1


def encode(symbols: Bytes, alphabet: int) -> tuple[Bytes, Bytes]:
    """The lengths of codes, packed, and the stream, in the groups that take the fewest bits."""
    best = _Grouped.of(symbols, alphabet, 1)
    if best.bits > _CLOSE * entropy_bits(np.bincount(symbols)) + _TABLE_BITS * alphabet:
        others = [_Grouped.of(symbols, alphabet, size) for size in _sizes(alphabet)[1:]]
        best = min([best, *(one for one in others if one.can_be_told)], key=lambda one: one.bits)
    stream = huffman.encode(best.groups, best.lengths, huffman.CHUNK // best.size)
    return pack_bits(best.lengths, _TABLE_BITS), stream


def decode(table: Bytes, stream: Bytes, alphabet: int, count: int) -> Bytes:
    """The symbols that `encode` was given; the size of the table tells that of the groups.

    Raises:
        SpecError: when the bytes are not of so many symbols.
    """
    size = group_size(table.size, alphabet)
    lengths = unpack_bits(table, _TABLE_BITS, _entries(alphabet, size)).astype(np.uint8)
    if size == 1:
        return huffman.decode(stream, lengths, count)
    if np.count_nonzero(lengths) < 2:
        raise SpecError("huffman table", "expected two groups or more")
    groups = huffman.decode(stream, lengths, -(-count // size), huffman.CHUNK // size)
    bits = width_of(alphabet)
    places = bits * np.arange(size, dtype=np.uint8)
    parts = groups[:, None] >> places & np.uint8((1 << bits) - 1)
    symbols: Bytes = parts.reshape(-1)[:count].astype(np.uint8)
    if symbols.size and int(symbols.max()) >= alphabet:
        raise SpecError("huffman stream", f"expected symbols below {alphabet}")
    return symbols


def group_size(table_bytes: int, alphabet: int) -> int:
    """Symbols in a group, by the size of the table.

    Raises:
        SpecError: when no groups have such a table.
    """
    for size in _sizes(alphabet):
        if -(-_entries(alphabet, size) * _TABLE_BITS // 8) == table_bytes:
            return size
    raise SpecError("huffman table", f"{table_bytes} bytes are none of {alphabet} symbols")


def width_of(alphabet: int) -> int:
    """Bits of a symbol."""
    return max(1, (alphabet - 1).bit_length())


def _sizes(alphabet: int) -> list[int]:
    return [size for size in (1, 2, 4, 8) if size == 1 or size * width_of(alphabet) <= _MOST_BITS]


def _entries(alphabet: int, size: int) -> int:
    return alphabet if size == 1 else 1 << (size * width_of(alphabet))


def _join(symbols: Bytes, alphabet: int, size: int) -> Bytes:
    """Groups with their first symbol in the lowest bits; zeros fill the last one up."""
    if size == 1:
        return symbols
    padded = np.zeros(-(-symbols.size // size) * size, np.uint8)
    padded[: symbols.size] = symbols
    places = width_of(alphabet) * np.arange(size, dtype=np.uint8)
    joined: Bytes = np.bitwise_or.reduce(padded.reshape(-1, size) << places, 1).astype(np.uint8)
    return joined
