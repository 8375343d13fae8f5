"""Symbols as the decoder in C reads them.

A stream is a byte for the coder, varints for the alphabet and for the number of symbols, the table
of frequencies, and the coded bytes after their number. The lowest 2 bits of the byte are the coder,
those above the logarithm of how many symbols share a code. All but the frame is as in a program
file (docs/format.md).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shohin.ir.coding import CODERS, Coder, encode_smallest
from shohin.ir.coding.groups import group_size
from shohin.ir.container.varints import encode_varint
from shohin.ir.gaps import codes_of, likely_gap_bits

_TRIED_WIDTHS = 2
_CODER_BITS = 2


def stream(symbols: NDArray[np.uint8], alphabet: int, coders: Sequence[Coder] = CODERS) -> bytes:
    """Symbols in the coder that makes them the smallest.

    Args:
        symbols: numbers below `alphabet`.
        alphabet: 1 to 256.
        coders: those to choose from.
    """
    coder, coded = encode_smallest(symbols, alphabet, coders)
    table = coded["table"].numpy().tobytes() if "table" in coded else b""
    size = group_size(len(table), alphabet) if coder == "huffman" else 1
    method = CODERS.index(coder) | (size.bit_length() - 1) << _CODER_BITS
    head = bytes([method]) + encode_varint(alphabet) + encode_varint(symbols.size)
    body = coded["stream"].numpy().tobytes()
    return b"".join((head, table, encode_varint(len(body)), body))


def gap_stream(positions: NDArray[np.int64], coders: Sequence[Coder] = CODERS) -> bytes:
    """Ascending numbers as gaps: a byte for the width of a code, and the codes.

    Args:
        positions: whole numbers from 0 on.
        coders: those to choose from.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    options = []
    for width in likely_gap_bits(gaps)[:_TRIED_WIDTHS]:
        codes = codes_of(gaps, width).astype(np.uint8)
        options.append(bytes([width]) + stream(codes, 1 << width, coders))
    return min(options, key=len)
