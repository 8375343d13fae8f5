"""Ternary weights whose two values are small integers times a whole number of each output.

The ratio of the two values that a layer was trained to becomes one of small integers, ``p : n``,
and each output gets the whole number, its *factor*, with which ``factor * p`` and ``factor * n``
have the least squared error. Kernels form sums of products with p and n, which leave room for many
of them in 16 bits, and multiply once with the factor.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.ir.fixed_point import MOST_BITS, FixedPoint
from shohin.ir.ternary import Ternary

LARGEST = 10
"""The largest of the small integers: twelve products of it with bytes fit 16 bits."""

_FACTOR_BITS = 4
"""Bits beyond those of a weight, for factors to be as fine as its integers would be."""

_SUM_BITS = 30
"""Bits of a sum for which factors are chosen, a bias left out."""


@dataclass(frozen=True, eq=False)
class Ratio:
    """What a ternary weight is made of.

    Attributes:
        codes: of the weight.
        positive: the small integer of the code 1.
        negative: that of the code -1, without its sign.
        factors: float64, one for all rows or one for each; not rounded yet.
        wanted: the ratio that the layer has.
    """

    codes: Tensor
    positive: int
    negative: int
    factors: Tensor
    wanted: float

    @classmethod
    def of(cls, stored: Ternary) -> "Ratio | None":
        """That of a weight whose rows have two values in one ratio; None for others."""
        if stored.scales.shape != (2,):
            return None
        above, below = stored.scales.materialise().detach().double().tolist()
        if not (math.isfinite(above) and math.isfinite(below)) or above <= 0 or below <= 0:
            return None
        positive, negative = nearest_pair(above / below)
        counts = _counts(stored.codes, by_row=stored.rows is not None)
        small = torch.tensor([positive, negative], dtype=torch.float64)
        large = torch.tensor([above, below], dtype=torch.float64)
        spent = (counts * small.square()).sum(1)
        factors = (counts * small * large).sum(1) / spent.where(spent > 0, 1.0)
        if stored.rows is not None:
            factors = factors * stored.rows.detach().double()
        return cls(stored.codes, positive, negative, factors, above / below)

    def bits(self, weights: int, data: int) -> int:
        """Width of the integers of the weight.

        Args:
            weights: the width that is asked for.
            data: width of what the weight is multiplied with.
        """
        most = int(_counts(self.codes, by_row=True).sum(1).max()) if self.codes.numel() else 1
        fitting = _SUM_BITS - (data - 1) - (max(1, most) - 1).bit_length() + 1
        return min(weights + _FACTOR_BITS, max(fitting, weights), MOST_BITS)

    def rounded(self, bits: int, fractions: Sequence[int]) -> Ternary:
        """The weight in fixed point.

        Args:
            bits: width of its integers.
            fractions: fractional lengths, one for all rows or one for each.
        """
        largest = (2 ** (bits - 1) - 1) // max(self.positive, self.negative)
        scales = 2.0 ** torch.tensor(fractions, dtype=torch.float64)
        factors = (self.factors * scales).round().clamp(-largest, largest) / scales
        values = torch.stack([factors * self.positive, factors * self.negative], 1).float()
        if len(values) == 1:
            values = values[0]
        return Ternary(self.codes, FixedPoint.from_values(values, bits, fractions))


def nearest_pair(ratio: float) -> tuple[int, int]:
    """The two coprime integers up to `LARGEST` whose ratio is nearest, by logarithm."""
    return min(_pairs(), key=lambda pair: (abs(math.log(ratio * pair[1] / pair[0])), sum(pair)))


def _pairs() -> Iterator[tuple[int, int]]:
    for positive in range(1, LARGEST + 1):
        for negative in range(1, LARGEST + 1):
            if math.gcd(positive, negative) == 1:
                yield positive, negative


def _counts(codes: Tensor, *, by_row: bool) -> Tensor:
    """How often the codes 1 and -1 occur ``[rows or 1, 2]``."""
    rows = codes.reshape(len(codes) if by_row else 1, -1)
    return torch.stack([(rows > 0).sum(1), (rows < 0).sum(1)], 1).double()
