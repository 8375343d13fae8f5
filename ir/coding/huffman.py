"""Canonical Huffman codes of at most 12 bits.

Codes are numbered by length and then by symbol, so that their lengths say everything. The stream
is cut into chunks, each of which begins with a byte, so that they can be decoded side by side. A
symbol that is the only one needs no stream at all.
"""

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from shohin.errors import SpecError

CHUNK = 2048
MOST_BITS = 12
MOST_SYMBOLS = 256

Bytes = NDArray[np.uint8]
Symbols = NDArray[np.uint8]


def code_lengths(counts: NDArray[np.integer]) -> Bytes:
    """Lengths in bits of the codes that take the fewest bits in all; 0 for what does not occur.

    Where the best codes are longer than 12 bits, the rarest symbols are taken to be more frequent
    until they are not. A lone symbol has a code of one bit.

    Args:
        counts: how often each symbol occurs, at most 256 of them.
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.uint8)
    floor = 1
    while True:
        lengths[used] = _lengths([max(floor, int(counts[symbol])) for symbol in used])
        if int(lengths.max(initial=0)) <= MOST_BITS:
            return lengths
        floor = max(2 * floor, -(-int(counts.sum()) >> MOST_BITS))


def _lengths(weights: list[int]) -> list[int]:
    """Depths of the leaves of a Huffman tree."""
    if len(weights) < 2:
        return [1] * len(weights)
    # The second entry makes the order of equal weights, and so the code, the same every time.
    heap = [(weight, index, [index]) for index, weight in enumerate(weights)]
    heapq.heapify(heap)
    depths = [0] * len(weights)
    for number in range(len(weights), 2 * len(weights) - 1):
        (low, _, ones), (high, _, others) = heapq.heappop(heap), heapq.heappop(heap)
        both = ones + others
        for leaf in both:
            depths[leaf] += 1
        heapq.heappush(heap, (low + high, number, both))
    return depths


def canonical_codes(lengths: Bytes) -> NDArray[np.uint16]:
    """The code of each symbol, in the lowest bits."""
    codes = np.zeros(len(lengths), np.uint16)
    code, last = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        length = int(lengths[symbol])
        if length:
            code <<= length - last
            codes[symbol], last = code, length
            code += 1
    return codes


def encode(symbols: Symbols, lengths: Bytes, chunk: int = CHUNK) -> Bytes:
    """The codes of symbols one after the other, highest bit first.

    Args:
        symbols: numbers.
        lengths: of their codes.
        chunk: symbols in a chunk.

    Returns:
        The number of bytes of every chunk but the last in 16 bits, lowest byte first, and then the
        chunks.
    """
    if np.count_nonzero(lengths) < 2:
        return np.zeros(0, np.uint8)
    codes = canonical_codes(lengths)
    chunks = [_encode_chunk(part, codes, lengths) for part in _chunks(symbols, chunk)]
    sizes = np.array([len(chunk) for chunk in chunks[:-1]], "<u2")
    return np.concatenate([sizes.view(np.uint8), *chunks])


def _encode_chunk(symbols: Symbols, codes: NDArray[np.uint16], lengths: Bytes) -> Bytes:
    widths = lengths[symbols].astype(np.int64)
    ends = np.cumsum(widths)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    values = codes[symbols]
    for back in range(1, MOST_BITS + 1):
        chosen = widths >= back
        bits[ends[chosen] - back] = (values[chosen] >> np.uint16(back - 1)) & 1
    return np.packbits(bits)


def decode(stream: Bytes, lengths: Bytes, count: int, chunk: int = CHUNK) -> Symbols:
    """The symbols that `encode` was given.

    Raises:
        SpecError: when the lengths make no code, or the stream is none of it.
    """
    used = np.flatnonzero(lengths)
    if used.size < 2 or count == 0:
        return _lone(stream, used, count)
    table = _Table.of(lengths)
    head = 2 * (-(-count // chunk) - 1)
    if stream.size < head:
        raise SpecError("huffman stream", f"expected {head} bytes of sizes, found {stream.size}")
    sizes = stream[:head].copy().view("<u2").astype(np.int64)
    starts = head + np.concatenate([[0], np.cumsum(sizes)])
    ends = np.concatenate([starts[1:], [stream.size]])
    if (ends < starts).any() or ends[-1] != stream.size:
        raise SpecError("huffman stream", f"chunks end after {stream.size} bytes")
    return table.decode(stream, starts, ends, (count, chunk))


def _lone(stream: Bytes, used: NDArray[np.intp], count: int) -> Symbols:
    if stream.size or (count and not used.size):
        raise SpecError("huffman stream", f"expected no bytes and a symbol, found {stream.size}")
    return np.full(count, used[0] if used.size else 0, np.uint8)


class _Table:
    """The symbol and the length of the code that every 12 bits begin with."""

    def __init__(self, symbols: Symbols, lengths: Bytes) -> None:
        self.symbols = symbols
        self.lengths = lengths.astype(np.int64)

    @classmethod
    def of(cls, lengths: Bytes) -> "_Table":
        used = lengths[lengths > 0].astype(np.int64)
        if used.max() > MOST_BITS or int((1 << (MOST_BITS - used)).sum()) != 1 << MOST_BITS:
            raise SpecError("huffman lengths", "expected those of a complete code")
        order = np.lexsort((np.arange(len(lengths)), lengths))
        order = order[lengths[order] > 0]
        spans = 1 << (MOST_BITS - lengths[order].astype(np.int64))
        return cls(np.repeat(order.astype(np.uint8), spans), np.repeat(lengths[order], spans))

    def decode(
        self,
        stream: Bytes,
        starts: NDArray[np.int64],
        ends: NDArray[np.int64],
        sizes: tuple[int, int],
    ) -> Symbols:
        """All chunks in step, a symbol of each at a time; sizes are of the stream and a chunk."""
        count, chunk = sizes
        found = np.zeros((len(starts), chunk), np.uint8)
        padded = np.concatenate([stream, np.zeros(4, np.uint8)])
        places, last = 8 * starts, count - chunk * (len(starts) - 1)
        for index in range(chunk if len(starts) > 1 else last):
            if index == last:
                places = places[:-1]
            windows = _window(padded, places)
            found[: len(places), index] = self.symbols[windows]
            places = places + self.lengths[windows]
            if (places > 8 * ends[: len(places)]).any():
                raise SpecError("huffman stream", "a code goes beyond the end of its chunk")
        return found.reshape(-1)[:count].copy()


def _window(stream: Bytes, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """12 bits at each place."""
    first = places >> 3
    three = (
        (stream[first].astype(np.int64) << 16)
        | (stream[first + 1].astype(np.int64) << 8)
        | stream[first + 2]
    )
    window: NDArray[np.int64] = (three >> (24 - MOST_BITS - (places & 7))) & ((1 << MOST_BITS) - 1)
    return window


def _chunks(symbols: Symbols, chunk: int) -> Iterator[Symbols]:
    for start in range(0, len(symbols), chunk):
        yield symbols[start : start + chunk]
