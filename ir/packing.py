"""Small whole numbers packed into bytes, so many bits each, lowest bit first."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shohin.errors import SpecError

MOST_BITS = 16

_CHUNK = 1 << 20
"""Numbers that are packed together: a multiple of 8, so that every chunk ends with a byte."""


def pack_bits(numbers: NDArray[np.unsignedinteger], bits: int) -> NDArray[np.uint8]:
    """Numbers below ``2**bits`` as ``ceil(n * bits / 8)`` bytes; what is left of the last is 0.

    Args:
        numbers: uint8 or uint16 ``[n]``.
        bits: width of a number, 1 to 16.
    """
    packed = np.empty(-(-numbers.size * bits // 8), np.uint8)
    for start, end, place in _chunks(numbers.size, bits):
        planes = (numbers[start:end, None] >> np.arange(bits, dtype=numbers.dtype)) & 1
        chunk = np.packbits(planes.astype(np.uint8).reshape(-1), bitorder="little")
        packed[place : place + chunk.size] = chunk
    return packed


def unpack_bits(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """The numbers that `pack_bits` packed.

    Args:
        packed: the bytes.
        bits: width of a number, 1 to 16.
        count: how many numbers there are.

    Raises:
        SpecError: when the bytes are fewer or more than so many numbers need.
    """
    needed = -(-count * bits // 8)
    if not 1 <= bits <= MOST_BITS or packed.size != needed:
        expected = f"expected {needed} bytes for {count} numbers of {bits} bits"
        raise SpecError("packed numbers", f"{expected}, found {packed.size}")
    numbers = np.empty(count, np.uint16)
    weights = np.left_shift(np.uint16(1), np.arange(bits, dtype=np.uint16))
    for start, end, place in _chunks(count, bits):
        planes = np.unpackbits(packed[place:], count=(end - start) * bits, bitorder="little")
        numbers[start:end] = planes.reshape(-1, bits) @ weights
    return numbers


def _chunks(count: int, bits: int) -> Iterator[tuple[int, int, int]]:
    """First number, end, and first byte of each chunk."""
    for start in range(0, count, _CHUNK):
        yield start, min(start + _CHUNK, count), start * bits // 8
