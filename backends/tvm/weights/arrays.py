"""Arrays as jobs of the decoder.

A job is a byte that says what it is, the varints that follow, and its data:

* 0, raw: place, bytes.
* 1, indexed: place, bytes of an element, *values*.
* 2, scattered: place, bytes of an element, number of elements, *gaps*, *values*: those that are
  not zero.
* 3, lists: place of the distances, their bytes, their number, 1 and the place of the starts or 0,
  number of lists, channels of a list, distance from channel to channel, step, whether lists are
  paired, number of taps, their distances; *gaps*.
* 4, words of indices: place, bits of an index, number of words, and the stream of the indices, as
  many as fit into each word, the first in its lowest bits.

*values* are a byte: 0, and so many elements; or 1, and the different elements (as many as the
stream's alphabet) behind the stream of their numbers.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.emit import Array
from shohin.backends.tvm.kernels.list_layout import ListLayout
from shohin.backends.tvm.weights.streams import gap_stream, stream
from shohin.ir.coding import CODERS, Coder, entropy_bits
from shohin.ir.container.varints import encode_varint

PIECE = 1 << 20
"""Elements of a job; larger arrays are cut, so that several threads can decode them."""

_MOST_DIFFERENT = 256
_WORD = 32
_FEW_ZEROS = 0.25
_MOST_MODULUS = 1 << 32


def raw_job(place: int, array: Array) -> bytes:
    """An array as it is.

    Args:
        place: where it goes, in bytes.
        array: contiguous.
    """
    return _head(0, place, array.nbytes) + array.tobytes()


def array_jobs(place: int, array: Array, coders: Sequence[Coder] = CODERS) -> list[bytes]:
    """An array in whichever form is the smallest.

    Args:
        place: where it goes, in bytes.
        array: contiguous, of elements of 1, 2, 4 or 8 bytes.
        coders: those to choose from.
    """
    numbers = array.reshape(-1).view(f"u{array.itemsize}")
    table = different_nonzeros(numbers)
    starts = range(0, numbers.size, PIECE)
    return [
        _piece(place + start * array.itemsize, numbers[start : start + PIECE], table, coders)
        for start in starts
    ]


def different_nonzeros(numbers: Array) -> Array | None:
    """The different numbers but 0, ascending; None where there are more than 256.

    Kernels fill up with zeros, so 256 centroids may become 257 numbers.
    """
    table = numbers[:0]
    for start in range(0, numbers.size, PIECE):
        part = numbers[start : start + PIECE]
        part = part[part != 0]
        if table.size:
            found = np.searchsorted(table, part).clip(0, table.size - 1)
            part = part[table[found] != part]
        table = np.union1d(table, part[: 4 * _MOST_DIFFERENT])
        table = np.union1d(table, part) if table.size <= _MOST_DIFFERENT else table
        if table.size > _MOST_DIFFERENT:
            return None
    return table


def lists_job(
    places: tuple[int, int | None],
    distance: Array,
    start: Array,
    layout: ListLayout,
    coders: Sequence[Coder] = CODERS,
) -> bytes | None:
    """Lists of a sparse kernel.

    Args:
        places: where distances and starts go, in bytes; None for starts that another job makes.
        distance: numbers that follow from places.
        start: first entry of each list, and the end of the last.
        layout: how they follow.
        coders: those to choose from.

    Returns:
        None where the arrays are no lists of that layout.
    """
    positions = layout.positions(distance, start)
    if positions is None:
        return None
    starts = (1, places[1]) if places[1] is not None else (0,)
    sizes = (len(start) - 1, layout.channels, layout.stride, layout.step, int(layout.paired))
    taps = [tap % _MOST_MODULUS for tap in layout.taps]
    entries = (places[0], distance.itemsize, distance.size)
    head = _head(3, *entries, *starts, *sizes, len(taps), *taps)
    return head + gap_stream(positions, coders)


def words_jobs(
    place: int, words: NDArray[np.uint32], bits: int, coders: Sequence[Coder] = CODERS
) -> list[bytes]:
    """Words of indices of a table.

    Args:
        place: where they go, in bytes.
        words: contiguous.
        bits: of an index, at most 8.
        coders: those to choose from.
    """
    shifts = np.arange(_WORD // bits, dtype=np.uint32) * np.uint32(bits)
    mask = np.uint32((1 << bits) - 1)
    step = PIECE // shifts.size
    jobs = []
    for start in range(0, words.size, step):
        part = words[start : start + step]
        indices = ((part[:, None] >> shifts) & mask).astype(np.uint8).reshape(-1)
        head = _head(4, place + 4 * start, bits, part.size)
        jobs.append(
            min(
                head + stream(indices, 1 << bits, coders),
                raw_job(place + 4 * start, part),
                key=len,
            )
        )
    return jobs


def _piece(place: int, numbers: Array, table: Array | None, coders: Sequence[Coder]) -> bytes:
    width, kept = numbers.itemsize, np.flatnonzero(numbers)
    plain = tuple(coders) == ("plain",)
    coded = _plain_sizes(numbers, table) if plain else _coded_sizes(numbers, kept, table)
    sizes = {0: float(numbers.nbytes), **coded}
    kind = min(sizes, key=lambda kind: sizes[kind])
    if kind == 0:
        return raw_job(place, numbers)
    if kind == 1:
        return _head(1, place, width) + _values(numbers, np.unique(numbers), coders)
    used = None if table is None or not kept.size else np.unique(numbers[kept])
    head = _head(2, place, width, numbers.size)
    return head + gap_stream(kept, coders) + _values(numbers[kept], used, coders)


def _plain_sizes(numbers: Array, table: Array | None) -> dict[int, float]:
    """The bytes of a piece whose elements are numbers of a table, as many bits as they need."""
    if table is None or len(table) >= _MOST_DIFFERENT:
        return {}
    bits = max(1, len(table).bit_length())
    return {1: numbers.size * bits / 8 + table.nbytes + numbers.itemsize}


def _coded_sizes(numbers: Array, kept: NDArray[np.intp], table: Array | None) -> dict[int, float]:
    """About how many bytes a piece takes as each kind of job that it can be."""
    zeros = numbers.size - kept.size
    values, sizes = float(kept.size * numbers.itemsize), {}
    if table is not None:
        counts = np.bincount(_indices(numbers[kept], table), minlength=table.size)
        values = entropy_bits(counts) / 8 + table.nbytes
        if table.size + bool(zeros) <= _MOST_DIFFERENT:
            sizes[1] = entropy_bits(np.append(counts, zeros)) / 8 + table.nbytes
    if zeros > _FEW_ZEROS * numbers.size or 1 not in sizes:
        sizes[2] = entropy_bits(np.array([zeros, kept.size])) / 8 + values
    return sizes


def _values(numbers: Array, table: Array | None, coders: Sequence[Coder]) -> bytes:
    """Elements as numbers of a table, or as they are."""
    if table is None:
        return b"\0" + numbers.tobytes()
    indices = _indices(numbers, table).astype(np.uint8)
    return b"\1" + stream(indices, table.size, coders) + table.tobytes()


def _indices(numbers: Array, table: Array) -> NDArray[np.intp]:
    return np.searchsorted(table, numbers)


def _head(*numbers: int) -> bytes:
    return b"".join(map(encode_varint, numbers))
