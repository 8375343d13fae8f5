"""Weights in the fewest bytes that their coders can make of them."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from shohin.ir.codebook import Codebook
from shohin.ir.coding import CODERS, Coder, encode_smallest
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.fixed_point import MOST_CODED_BITS, FixedPoint
from shohin.ir.gaps import codes_of, gaps_of, likely_gap_bits
from shohin.ir.program import Program, encoding_of, tied_names
from shohin.ir.ternary import Ternary

_TRIED_WIDTHS = 3


def entropy_coded(
    encoding: Encoding, coders: Sequence[Coder] = CODERS, gap_bits: int | None = None
) -> Encoding:
    """The same values with indices, integers and gaps coded; others as they are.

    Args:
        encoding: of a weight.
        coders: those to choose from, stream by stream.
        gap_bits: width of a gap, 1 to 8; None for the one that takes the least.

    Returns:
        The very same object where nothing else is chosen than what it has.
    """
    if isinstance(encoding, Codebook):
        symbols = encoding.indices.reshape(-1).numpy()
        coder, _ = smallest(symbols, encoding.centroids.numel(), coders)
        return encoding if coder == encoding.coder else replace(encoding, coder=coder)
    if isinstance(encoding, FixedPoint) and encoding.bits <= MOST_CODED_BITS:
        coder, _ = smallest(encoding.symbols().astype(np.uint8), 1 << encoding.bits, coders)
        return encoding if coder == encoding.coder else replace(encoding, coder=coder)
    if isinstance(encoding, Ternary):
        coder, _ = smallest(encoding.symbols(), 3, coders)
        return encoding if coder == encoding.coder else replace(encoding, coder=coder)
    if isinstance(encoding, Sparse):
        return _coded_sparse(encoding, coders, gap_bits)
    return encoding


def smallest(
    symbols: NDArray[np.uint8], alphabet: int, coders: Sequence[Coder] = CODERS
) -> tuple[Coder, int]:
    """The coder that takes the fewest bytes, and how many.

    Args:
        symbols: uint8 ``[n]``, below `alphabet`.
        alphabet: number of different symbols there may be, 1 to 256.
        coders: those to choose from.
    """
    coder, coded = encode_smallest(symbols, alphabet, coders)
    return coder, sum(tensor.numel() for tensor in coded.values())


def coded_bytes_beside(program: Program, names: Collection[str]) -> int:
    """Size of the entropy-coded encodings of what a graph reads beside some weights."""
    tied = (group for group in tied_names(program) if not any(name in names for name in group))
    return sum(entropy_coded(encoding_of(program, group[0])).stored_bytes() for group in tied)


def _coded_sparse(sparse: Sparse, coders: Sequence[Coder], gap_bits: int | None) -> Sparse:
    width, coder = _gaps(sparse, coders, gap_bits)
    values = entropy_coded(sparse.values, coders)
    if values is sparse.values and (width, coder) == (sparse.gap_bits, sparse.coder):
        return sparse
    return replace(sparse, values=values, gap_bits=width, coder=coder)


def _gaps(sparse: Sparse, coders: Sequence[Coder], gap_bits: int | None) -> tuple[int, Coder]:
    """Width and coder of the gaps."""
    gaps = gaps_of(sparse.mask)
    widths = [gap_bits] if gap_bits else likely_gap_bits(gaps)[:_TRIED_WIDTHS]
    options = {
        width: smallest(codes_of(gaps, width).astype(np.uint8), 1 << width, coders)
        for width in widths
    }
    best = min(options, key=lambda width: (options[width][1], width))
    plain = -(-sparse.codes() * sparse.gap_bits // 8)
    if sparse.coder == "plain" and not gap_bits and plain <= options[best][1]:
        return sparse.gap_bits, "plain"
    return best, options[best][0]
