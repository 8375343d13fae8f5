"""Whole numbers in as few bytes as they need: seven bits in each, the lowest first (LEB128)."""

from shohin.errors import SpecError

MOST_BYTES = 9
"""Of a number; so it is below 2^63."""


def encode_varint(number: int) -> bytes:
    """A number from 0 to 2^63 - 1."""
    if not 0 <= number < 1 << (7 * MOST_BYTES):
        raise SpecError("varint", f"expected 0 to 2^63 - 1, got {number}")
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


class Cursor:
    """Reads a block of bytes from front to back.

    Args:
        data: the block.
        where: what it is, for errors.
    """

    def __init__(self, data: bytes | memoryview, where: str) -> None:
        self._data = memoryview(data)
        self._where = where
        self._place = 0

    def take(self, count: int) -> memoryview:
        """The next bytes.

        Raises:
            SpecError: when there are fewer.
        """
        if count > len(self._data) - self._place:
            left = len(self._data) - self._place
            raise SpecError(self._where, f"expected {count} more bytes, found {left}")
        found = self._data[self._place : self._place + count]
        self._place += count
        return found

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """The next number.

        Raises:
            SpecError: when it does not end, or takes more bytes than it needs.
        """
        number = 0
        for index in range(MOST_BYTES):
            byte = self.byte()
            number |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                if byte == 0 and index:
                    raise SpecError(self._where, "a number is longer than it needs to be")
                return number
        raise SpecError(self._where, f"expected a number of at most {MOST_BYTES} bytes")

    def rest(self) -> memoryview:
        """All bytes that are left."""
        return self.take(len(self._data) - self._place)

    def done(self) -> bool:
        """Whether nothing is left."""
        return self._place == len(self._data)
