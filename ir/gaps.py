"""Positions of the non-zeros as gaps of a few bits (Deep Compression, arXiv 1510.00149, section 2).

A code of `b` bits below ``2**b - 1`` is the number of zeros before the next non-zero; the code
``2**b - 1`` stands for so many zeros with no non-zero after them. The paper stores a zero weight
with that code; the code alone says as much. With one bit, the codes are a bitmap.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.coding import entropy_bits
from shohin.ir.packing import MOST_BITS

_TABLE_BITS = 4
"""What a coder needs to describe a symbol's frequency."""


def gaps_of(mask: Tensor) -> NDArray[np.int64]:
    """Zeros before each non-zero of a bool tensor, in row-major order."""
    kept = np.flatnonzero(mask.reshape(-1).numpy())
    gaps = kept.copy()
    gaps[1:] -= kept[:-1]
    gaps[1:] -= 1
    return gaps


def count_codes(gaps: NDArray[np.int64], bits: int) -> int:
    """Number of codes that gaps need."""
    return int(gaps.size + (gaps // _span(bits)).sum())


def best_gap_bits(mask: Tensor) -> int:
    """The width that stores a mask in the fewest bits."""
    gaps = gaps_of(mask)
    return min(range(1, MOST_BITS + 1), key=lambda bits: (bits * count_codes(gaps, bits), bits))


def gap_codes(mask: Tensor, bits: int) -> NDArray[np.uint16]:
    """The codes of a mask."""
    return codes_of(gaps_of(mask), bits)


def codes_of(gaps: NDArray[np.int64], bits: int) -> NDArray[np.uint16]:
    """The codes of gaps.

    Args:
        gaps: zeros before each non-zero.
        bits: width of a code.
    """
    span = _span(bits)
    skips = gaps // span
    codes = np.full(gaps.size + int(skips.sum()), span, np.uint16)
    codes[np.cumsum(skips + 1) - 1] = gaps - skips * span
    return codes


def likely_gap_bits(gaps: NDArray[np.int64]) -> list[int]:
    """Widths of at most 8 bits, the one that entropy coding likely makes the smallest first.

    Args:
        gaps: zeros before each non-zero.
    """

    def bits(width: int) -> float:
        return entropy_bits(np.bincount(codes_of(gaps, width))) + (_TABLE_BITS << width)

    return sorted(range(1, 9), key=bits)


def mask_of(codes: NDArray[np.unsignedinteger], bits: int, shape: tuple[int, ...]) -> Tensor:
    """The mask that codes stand for.

    Args:
        codes: what `gap_codes` gave.
        bits: width of a code.
        shape: shape of the mask.

    Raises:
        SpecError: when the codes point outside of the mask.
    """
    mask = torch.zeros(shape, dtype=torch.bool)
    skips = codes == _span(bits)
    steps = codes.astype(np.int64)
    steps[~skips] += 1
    kept = (np.cumsum(steps) - 1)[~skips]
    if kept.size and kept[-1] >= mask.numel():
        raise SpecError("sparse gaps", f"expected positions below {mask.numel()}, got {kept[-1]}")
    mask.view(-1)[torch.from_numpy(kept)] = True
    return mask


def _span(bits: int) -> int:
    return (1 << bits) - 1
