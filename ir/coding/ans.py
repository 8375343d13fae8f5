"""Asymmetric numeral systems (Duda, arXiv 1311.2540), by the library `constriction`.

Its streams are 32-bit words, lowest byte first; a decoder needs whole numbers alone: with
probabilities ``f_i / 2^16``, a symbol occupies ``[floor(F_i (2^24 - n) / 2^16) + i, ...)`` of 2^24,
where `F_i` is the sum of the `f_j` with ``j < i`` and `n` the number of symbols.
"""

import constriction
import numpy as np
from numpy.typing import NDArray

from shohin.errors import SpecError

LEVELS = 63
"""Frequencies are kept as levels of a quarter of an octave, 1 to 63; 0 for what does not occur."""

_TOTAL = 1 << 16
_SCALE = np.array([round(2 ** (level / 4) * 16) for level in range(LEVELS)], np.int64)

Bytes = NDArray[np.uint8]
Symbols = NDArray[np.uint8]


def frequency_levels(counts: NDArray[np.integer]) -> Bytes:
    """How frequent symbols are, in levels that are told apart by a factor of ``2^(1/4)``.

    Args:
        counts: how often each symbol occurs, at most 256 of them.
    """
    largest = max(1, int(counts.max(initial=1)))
    with np.errstate(divide="ignore"):
        levels = np.rint(4 * np.log2(counts / largest)) + LEVELS
    return np.where(counts > 0, np.clip(levels, 1, LEVELS), 0).astype(np.uint8)


def frequencies(levels: Bytes) -> NDArray[np.int64]:
    """Frequencies of the symbols that occur: at least 1, and 2^16 in all."""
    raw = _SCALE[levels[levels > 0].astype(np.int64) - 1]
    found = 1 + raw * (_TOTAL - raw.size) // max(1, int(raw.sum()))
    if found.size:
        found[found.argmax()] += _TOTAL - int(found.sum())
    return found


def encode(symbols: Symbols, levels: Bytes) -> Bytes:
    """A stream of symbols; empty where there are fewer than two different ones."""
    used = np.flatnonzero(levels)
    if used.size < 2:
        return np.zeros(0, np.uint8)
    ranks = np.zeros(len(levels), np.int32)
    ranks[used] = np.arange(used.size)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(ranks[symbols], _model(levels))
    words: NDArray[np.uint32] = coder.get_compressed()
    stream: Bytes = words.astype("<u4").view(np.uint8)
    return stream


def decode(stream: Bytes, levels: Bytes, count: int) -> Symbols:
    """The symbols that `encode` was given.

    Raises:
        SpecError: when the stream is none of so many symbols.
    """
    used = np.flatnonzero(levels)
    if levels.max(initial=0) > LEVELS or stream.size % 4:
        raise SpecError("ans stream", f"malformed: {stream.size} bytes")
    if used.size < 2 or count == 0:
        if stream.size or (count and not used.size):
            problem = f"expected no bytes and a symbol, found {stream.size}"
            raise SpecError("ans stream", problem)
        return np.full(count, used[0] if used.size else 0, np.uint8)
    words = stream.copy().view("<u4").astype(np.uint32)
    if not words.size or words[-1] == 0:
        raise SpecError("ans stream", "expected a last word that is not 0")
    coder = constriction.stream.stack.AnsCoder(words)
    ranks = coder.decode(_model(levels), count)
    if not coder.is_empty():
        raise SpecError("ans stream", f"expected {count} symbols, found more")
    symbols: Symbols = used[ranks].astype(np.uint8)
    return symbols


def _model(levels: Bytes) -> "constriction.stream.model.Categorical":
    probabilities = frequencies(levels) / _TOTAL
    return constriction.stream.model.Categorical(probabilities, perfect=False)
