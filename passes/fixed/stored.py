"""Weights in fixed point: their numbers, and how they are stored."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.fixed_point import FixedPoint, quantize
from shohin.ir.ternary import Ternary


def rounded_weight(weight: Tensor, bits: int, fractions: Sequence[int]) -> Tensor:
    """A weight on its grid, every number with its negative.

    Args:
        weight: float32 `[outputs, ...]`.
        bits: width of the integers.
        fractions: one for all, or one for each output.
    """
    values = weight.detach()
    if len(fractions) == 1:
        return quantize(values, bits, fractions[0], symmetric=True)
    rows = zip(values, fractions, strict=True)
    return torch.stack([quantize(row, bits, one, symmetric=True) for row, one in rows])


def can_encode(stored: Encoding) -> bool:
    """Whether a weight in that encoding can be stored in fixed point."""
    inner = stored.values if isinstance(stored, Sparse) else stored
    if isinstance(inner, Ternary):
        return isinstance(inner.scales, Dense)
    return isinstance(inner, (Dense, Codebook))


def is_trainable(stored: Encoding) -> bool:
    """Whether every stored number of a weight can change by itself."""
    inner = stored.values if isinstance(stored, Sparse) else stored
    return isinstance(inner, FixedPoint)


def encoded(
    stored: Encoding, weight: Tensor, bits: int, fractions: Sequence[int]
) -> Encoding | None:
    """How a weight is stored once its numbers are rounded; None where nothing fits.

    Args:
        stored: how it was stored before.
        weight: what `rounded_weight` gave.
        bits: width of the integers.
        fractions: one for all, or one for each output.
    """
    if isinstance(stored, (Dense, FixedPoint)):
        return FixedPoint.from_values(weight, bits, fractions)
    if isinstance(stored, Ternary):
        return _encoded_ternary(stored, bits, fractions)
    if len(fractions) > 1:
        return None
    if isinstance(stored, Sparse):
        inner = encoded(stored.values, weight[stored.mask], bits, fractions)
        return None if inner is None else replace(stored, values=inner)
    if isinstance(stored, Codebook):
        centroids = quantize(stored.centroids, bits, fractions[0], symmetric=True)
        return replace(stored, centroids=centroids)
    return None


def lost_values(stored: Encoding, found: Encoding) -> int:
    """How many values of the rows of a ternary weight rounding made zero; 0 for other weights.

    Args:
        stored: how it was stored before.
        found: how it is stored with its values rounded.
    """
    if not isinstance(stored, Ternary) or not isinstance(found, Ternary):
        return 0
    return int(((stored.pairs() != 0) & (found.pairs() == 0)).sum())


def _encoded_ternary(stored: Ternary, bits: int, fractions: Sequence[int]) -> Ternary:
    """The same codes; the two values are on the grid, of all rows or of each."""
    pairs = stored.pairs()
    if len(fractions) > 1:
        pairs = pairs.expand(len(fractions), 2)
    values = rounded_weight(pairs, bits, fractions)
    if len(values) == 1:
        values = values[0]
    return replace(stored, scales=FixedPoint.from_values(values, bits, fractions), rows=None)
