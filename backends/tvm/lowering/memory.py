"""Where values live: constants in a file, everything else in a statically planned arena."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.list_layout import ListLayout
from shohin.backends.tvm.lowering.operations import Array

ALIGNMENT = 64

BufferKind = Literal["arena", "input", "output", "constant"]


@dataclass(eq=False)
class Buffer:
    """A piece of memory.

    Attributes:
        kind: who owns it.
        bytes: its size.
        index: number of the input or output.
        offset: place in the arena or in the constants, once known.
        first: number of the first call that uses it.
        last: number of the last call that uses it.
    """

    kind: BufferKind
    bytes: int
    index: int = 0
    offset: int = 0
    first: int = -1
    last: int = -1

    def touch(self, call: int) -> None:
        """Note that a call uses the buffer."""
        self.first = call if self.first < 0 else self.first
        self.last = max(self.last, call)


@dataclass(frozen=True)
class Placement:
    """An array at a byte offset in a buffer."""

    buffer: Buffer
    offset: int = 0


def align(size: int) -> int:
    """Size rounded up to whole alignment units."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class StoredArray:
    """An array in the file of constants.

    Attributes:
        buffer: its place.
        dtype: its element type.
        lists: where it is the lists of a sparse kernel, the array of their starts, and how they
            follow from which weights are kept.
        index_bits: where it is 32-bit words of indices, as many as fit, the width of an index.
    """

    buffer: Buffer
    dtype: "np.dtype[np.generic]"
    lists: "tuple[StoredArray, ListLayout] | None" = None
    index_bits: int = 0


@dataclass
class ConstantFile:
    """Constants, written to a file as they are packed, equal ones once.

    Only one packed array is in memory at a time, however large the model is.

    Attributes:
        path: the file; None to plan without writing anything.
        size: bytes written so far.
    """

    path: Path | None
    size: int = 0
    _known: dict[bytes, StoredArray] = field(default_factory=dict)
    _of: dict[Buffer, StoredArray] = field(default_factory=dict)

    @property
    def arrays(self) -> list[StoredArray]:
        """What was written, in order."""
        return list(self._of.values())

    def read(self, stored: StoredArray) -> Array:
        """An array, flat, mapped from the file."""
        if self.path is None or not stored.buffer.bytes:
            return np.zeros(0, stored.dtype)
        count = stored.buffer.bytes // stored.dtype.itemsize
        return np.memmap(self.path, stored.dtype, "r", stored.buffer.offset, (count,))

    def mark_lists(self, index: Placement, start: Placement, layout: ListLayout) -> None:
        """Say that an array is lists, and how they can be made again from less."""
        if self.path is not None:
            self._of[index.buffer].lists = (self._of[start.buffer], layout)

    def add(self, pack: Callable[[], Array]) -> Placement:
        """Append the array that a function gives, and say where it is."""
        if self.path is None:
            return Placement(Buffer("constant", 0))
        data = np.ascontiguousarray(pack())
        raw: NDArray[np.uint8] = np.atleast_1d(data).reshape(-1).view(np.uint8)
        digest = hashlib.sha256(raw.data).digest() + str(raw.size).encode()
        if digest not in self._known:
            stored = StoredArray(self._append(self.path, raw), data.dtype)
            self._known[digest] = self._of[stored.buffer] = stored
        return Placement(self._known[digest].buffer)

    def mark_words(self, words: Placement, index_bits: int) -> None:
        """Say that an array is words of so wide indices."""
        if self.path is not None:
            self._of[words.buffer].index_bits = index_bits

    def _append(self, path: Path, raw: NDArray[np.uint8]) -> Buffer:
        start = align(self.size)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.seek(start)
            raw.tofile(file)
        self.size = start + raw.size
        return Buffer("constant", raw.size, offset=start)


def plan_arena(buffers: list[Buffer]) -> int:
    """Give every arena buffer an offset so that no two alive at once overlap.

    Greedy by size (Pisarchyk and Lee 2020, arXiv 2001.03288): large buffers first, each at the
    lowest offset that is free for its whole life.

    Returns:
        Size of the arena in bytes.
    """
    alive = [buffer for buffer in buffers if buffer.kind == "arena" and buffer.first >= 0]
    placed: list[Buffer] = []
    total = 0
    for buffer in sorted(alive, key=lambda b: (-b.bytes, b.first)):
        buffer.offset = _lowest_gap(buffer, placed)
        placed.append(buffer)
        total = max(total, buffer.offset + align(buffer.bytes))
    return total


def _lowest_gap(buffer: Buffer, placed: list[Buffer]) -> int:
    rivals = sorted(
        (other for other in placed if other.first <= buffer.last and buffer.first <= other.last),
        key=lambda other: other.offset,
    )
    offset = 0
    for other in rivals:
        if other.offset - offset >= buffer.bytes:
            break
        offset = max(offset, other.offset + align(other.bytes))
    return offset
