"""Reads AArch64 machine code: what the innermost loops of an object are made of."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

AARCH64 = 183
"""``EM_AARCH64`` of the ELF specification."""

_EXECUTABLE = 4
_FMLA_BY_LANE = (0xFFC0F400, 0x4F801000)
_FMLA_VECTOR = (0xFFE0FC00, 0x4E20CC00)
_ONE_AT_STACK = (0xFF8003E0, 0x3D8003E0)
_TWO_AT_STACK = (0xFF8003E0, 0xAD0003E0)


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        words: its instructions.
    """

    words: tuple[int, ...]

    @property
    def products(self) -> int:
        """Multiply-accumulates of four floats."""
        return self.by_lane + _count(self.words, _FMLA_VECTOR)

    @property
    def by_lane(self) -> int:
        """Those that take one factor from a lane of a register."""
        return _count(self.words, _FMLA_BY_LANE)

    @property
    def spills(self) -> int:
        """Loads and stores of vector registers at the stack pointer."""
        return _count(self.words, _ONE_AT_STACK) + _count(self.words, _TWO_AT_STACK)


def machine_of(path: Path) -> int:
    """The machine that an ELF file says it is for."""
    header = path.read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    return int(struct.unpack_from("<H", header, 18)[0])


def inner_loops(path: Path) -> list[Loop]:
    """The innermost loops of an object file, in order."""
    return [loop for words in _sections(path.read_bytes()) for loop in _loops(words)]


def _sections(content: bytes) -> Iterator[tuple[int, ...]]:
    """The instructions of each section that holds any."""
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count = struct.unpack_from("<HH", content, 0x3A)
    for index in range(count):
        start = table + index * size
        (flags,) = struct.unpack_from("<Q", content, start + 8)
        offset, length = struct.unpack_from("<QQ", content, start + 0x18)
        if flags & _EXECUTABLE:
            yield struct.unpack_from(f"<{length // 4}I", content, offset)


def _loops(words: tuple[int, ...]) -> Iterator[Loop]:
    ends = {}
    for index, word in enumerate(words):
        target = index + _distance(word)
        if 0 <= target < index:
            ends[target] = min(index, ends.get(target, index))
    # Loops nest, so one is innermost when the next to begin lies behind its end.
    starts = [*sorted(ends), len(words)]
    for start, following in pairwise(starts):
        if ends[start] < following:
            yield Loop(words[start : ends[start] + 1])


def _distance(word: int) -> int:
    """How many instructions further a branch goes; 0 for everything else."""
    if word & 0xFF000010 == 0x54000000 or word & 0x7E000000 == 0x34000000:
        return _signed(word >> 5, 19)
    if word & 0x7E000000 == 0x36000000:
        return _signed(word >> 5, 14)
    return _signed(word, 26) if word & 0xFC000000 == 0x14000000 else 0


def _signed(word: int, bits: int) -> int:
    value = word & ((1 << bits) - 1)
    return value - (1 << bits) if value >> (bits - 1) else value


def _count(words: tuple[int, ...], pattern: tuple[int, int]) -> int:
    mask, value = pattern
    return sum(word & mask == value for word in words)
