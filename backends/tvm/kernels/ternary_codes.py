"""Ternary weights as two bits each, sixteen to a word: how they are packed and expanded.

Of a weight's two bits the lower says that it is its row's first value (code 1), the upper that it
is the second (code -1); neither, that it is 0.
"""

from collections.abc import Sequence

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    ceil_div,
    held,
    number,
    ramp,
    splat,
)

BITS = 2
"""Bits of a code."""

CODES_A_WORD = 16
"""Codes of a word of 32 bits."""

VALUES = 2
"""Values of a row."""

MOST_SCRATCH = 1 << 19
"""Bytes of weights expanded at once: half of the stack that a kernel has at least."""

_WORD_BYTES = 4


def pack_codes(codes: Array) -> Array:
    """Words of codes that follow each other along the last axis but one.

    Args:
        codes: ``[..., K, N]``, numbers 1, 0 and -1.

    Returns:
        Bytes of little-endian words ``[..., ceil(K / 16), 4 * N]``, 0 where ragged.
    """
    *outer, depth, columns = codes.shape
    words = ceil_div(depth, CODES_A_WORD)
    full = np.zeros((*outer, words * CODES_A_WORD, columns), np.int8)
    full[..., :depth, :] = codes
    parts = full.reshape(*outer, words, CODES_A_WORD, columns)
    packed = np.zeros((*outer, words, columns), np.uint32)
    for place in range(CODES_A_WORD):
        one = parts[..., place, :]
        bits = (one > 0).astype(np.uint32) | (one < 0).astype(np.uint32) << np.uint32(1)
        packed |= bits << np.uint32(BITS * place)
    return packed.view(np.uint8)


def load_words(codes: Buffer, place: Sequence[Expr], block: int) -> Expr:
    """The words of 16 neighbouring columns, held in registers.

    Args:
        codes: bytes of words.
        place: every index but the last.
        block: which sixteen columns.
    """
    read = codes[(*place, ramp(block * _WORD_BYTES * LANES, _WORD_BYTES * LANES))]
    return held(T.reinterpret(f"int32x{LANES}", read), LANES, "int32")


def decoded(words: Expr, place: int, values: Sequence[Expr]) -> Expr:
    """The weights of the codes at a place of words.

    Args:
        words: 16 lanes of 32 bits.
        place: 0 to 15.
        values: 16 lanes of what codes 1 and -1 stand for.
    """
    first, second = (_is_set(words, BITS * place + bit) for bit in range(BITS))
    return T.Select(first, values[0], T.Select(second, values[1], number(0.0)))


def _is_set(words: Expr, bit: int) -> Expr:
    mask = int(np.uint32(1 << bit).view(np.int32))
    return T.bitwise_and(words, splat(T.int32(mask))) != splat(T.int32(0))
