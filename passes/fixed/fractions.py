"""Fractional lengths: the one that represents some numbers best.

Range analysis gives the largest fractional length for which nothing overflows; its neighbours are
tried as well, as a few saturated numbers may cost less than a coarser grid (Qiu et al., section 5).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shohin.ir.fixed_point import FRACTIONS, Rounding, limits, quantize

_BELOW, _ABOVE = 1, 4
_FEW_BITS = 8
"""With fewer, a coarser grid costs more than saturation: finer ones are tried as well."""


def fitting_fraction(largest: float, bits: int) -> int:
    """The largest fractional length with which a number does not overflow.

    Args:
        largest: the largest absolute value; for 0 the format is for numbers below 1.
        bits: width of the integers.
    """
    _, high = limits(bits)
    if largest <= 0:
        return bits - 1
    fraction = math.floor(math.log2(high / largest))
    # The logarithm is rounded: whether the number fits decides.
    fraction += 1 if largest * 2.0 ** (fraction + 1) <= high else 0
    fraction -= 1 if largest * 2.0**fraction > high else 0
    return min(max(fraction, FRACTIONS[0]), FRACTIONS[-1])


def candidates(largest: float, bits: int, most: int = FRACTIONS[-1]) -> list[int]:
    """Fractional lengths worth trying, ascending.

    Args:
        largest: the largest absolute value.
        bits: width of the integers.
        most: the largest that makes sense.
    """
    fitting = fitting_fraction(largest, bits)
    above = _ABOVE + max(0, _FEW_BITS - bits)
    found = range(fitting - _BELOW, fitting + above + 1)
    inside = [one for one in found if FRACTIONS[0] <= one <= min(most, FRACTIONS[-1])]
    return inside or [max(min(fitting, most), FRACTIONS[0])]


def weight_error(values: Tensor, bits: int, fraction: int) -> float:
    """``sum |W - W(bits, fraction)|``."""
    exact = values.detach().double()
    return float((exact - quantize(exact, bits, fraction, symmetric=True)).abs().sum())


def weight_fraction(values: Tensor, bits: int, most: int = FRACTIONS[-1]) -> int:
    """The fractional length, `most` at most, for which `weight_error` is least."""
    tried = candidates(_largest(values), bits, most)
    errors = {one: weight_error(values, bits, one) for one in tried}
    return min(tried, key=lambda one: (errors[one], one))


def channel_fractions(values: Tensor, bits: int, most: Sequence[int]) -> tuple[int, ...]:
    """The same for each output channel, along axis 0, with a limit for each."""
    rows = zip(values, most, strict=True)
    return tuple(weight_fraction(row, bits, limit) for row, limit in rows)


def common_weight_fraction(weights: Sequence[Tensor], bits: Sequence[int]) -> int:
    """One fractional length for several weights: that of the least relative error, summed.

    Args:
        weights: the weights.
        bits: the width of each one's integers.
    """
    pairs = list(zip(weights, bits, strict=True))
    tried = sorted({one for w, width in pairs for one in candidates(_largest(w), width)})
    errors = {one: sum(_relative(w, width, one) for w, width in pairs) for one in tried}
    return min(tried, key=lambda one: (errors[one], one))


def _relative(values: Tensor, bits: int, fraction: int) -> float:
    size = float(values.detach().double().abs().sum())
    return weight_error(values, bits, fraction) / size if size else 0.0


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().max()) if values.numel() else 0.0


def data_errors(
    wanted: Tensor, found: Tensor, bits: int, fractions: Sequence[int], rounding: Rounding
) -> Tensor:
    """Sums of the absolute and of the squared errors of a feature map.

    Args:
        wanted: numbers of the float network.
        found: those of the fixed-point network before they are rounded.
        bits: width of the integers.
        fractions: fractional lengths.
        rounding: how to round.

    Returns:
        float64 `[2, fractions]`.
    """
    errors = [wanted - quantize(found, bits, one, rounding) for one in fractions]
    sums = [(one.abs().sum().double(), one.square().sum().double()) for one in errors]
    return torch.tensor(sums, dtype=torch.float64).T
