"""What results can come to before they are rounded, proved from weights and formats."""

import math

import torch
from torch import Tensor, fx

from shohin.errors import PassError
from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.fixed_point import FRACTIONS, MOST_APART, largest_sums
from shohin.passes.fixed.forms import Average, Binary, Join, Weighted
from shohin.passes.fixed.graph import Site
from shohin.passes.patterns import argument, constant_weight

SUM_BITS = 32
"""Bits of the sums that kernels compute with where nothing wider is needed."""


def format_of(node: fx.Node) -> ActivationFormat:
    """The format of a feature map that has one already."""
    found = annotation(node, ActivationFormat)
    if found is None:
        raise AssertionError("formats are chosen in the order of the graph")
    return found


def natural_fraction(site: Site) -> int:
    """The radix of a site's exact results: no finer one tells more of them."""
    node, form = site.node, site.form
    if form is None:
        return FRACTIONS[-1]
    if isinstance(form, Weighted):
        fractions = argument(node, "weight_fractions")
        return int(max(fractions)) + int(argument(node, "input_fraction"))
    operands = [format_of(one).fraction for one in _operands(site)]
    if isinstance(form, Average):
        return operands[0] + int(argument(node, "shift"))
    if isinstance(form, Binary):
        return sum(operands) if form.product else max(operands)
    return max(operands)


def check_summands(site: Site) -> None:
    """Refuse a sum of numbers whose scales are so far apart that no sum of them is exact.

    Raises:
        PassError: naming the sum.
    """
    if not isinstance(site.form, Binary) or site.form.product:
        return
    fractions = [format_of(one).fraction for one in _operands(site)]
    apart = max(fractions) - min(fractions)
    if apart > MOST_APART:
        raise PassError(
            f"fixed-point, node '{site.source}'",
            f"expected summands whose radixes are at most {MOST_APART} bits apart, got {apart}",
            "one of them is as good as zero beside the other: leave it out, or exclude the layer "
            "that computes it",
        )


def largest_result(site: Site) -> float:
    """The largest absolute value that any data can give."""
    node, form = site.node, site.form
    if isinstance(form, Weighted):
        sums = weighted_sums(node)
        fractions = torch.tensor(argument(node, "weight_fractions")).double()
        scale = 2.0 ** -(fractions + argument(node, "input_fraction"))
        return float((sums * scale).max()) if sums.numel() else 0.0
    limits = [2.0 ** (one.bits - 1 - one.fraction) for one in map(format_of, _operands(site))]
    if isinstance(form, Average):
        area = math.prod(argument(node, "kernel"))
        scale = argument(node, "multiplier") * 2.0 ** -argument(node, "shift")
        return float(limits[0] * area * scale)
    if isinstance(form, Binary):
        return limits[0] * limits[1] if form.product else sum(limits)
    return max(limits)


def weighted_sums(node: fx.Node) -> Tensor:
    """The largest sum of products of each output of a convolution or linear map, as integers."""
    weight, bias = constant_weight(argument(node, "weight")), argument(node, "bias")
    fractions, fraction = argument(node, "weight_fractions"), argument(node, "input_fraction")
    if weight is None:
        raise AssertionError("weights of fixed-point operators are constants")
    data = format_of(argument(node, "input"))
    rows = torch.tensor(fractions).double().reshape(-1, *[1] * (weight.dim() - 1))
    whole = (weight.double() * 2.0**rows).round()
    values = constant_weight(bias)
    if values is None:
        return largest_sums(whole, None, data.bits)
    radix = 2.0 ** (rows.reshape(-1) + fraction)
    return largest_sums(whole, values.double() * radix, data.bits)


def largest_window(site: Site) -> float:
    """The largest sum of integers of a window that is averaged."""
    bits = format_of(argument(site.node, "input")).bits
    return float(math.prod(argument(site.node, "kernel")) << (bits - 1))


def room(site: Site, bits: int) -> int:
    """The largest fractional length with which no result overflows."""
    largest = largest_result(site)
    if largest <= 0:
        return FRACTIONS[-1]
    return min(math.floor(math.log2((2 ** (bits - 1) - 1) / largest)), FRACTIONS[-1])


def _operands(site: Site) -> list[fx.Node]:
    """The feature maps that a site is made of."""
    if isinstance(site.form, Join):
        return [argument(one, "input") for one in site.rounding_nodes]
    names = ("input", "other") if isinstance(site.form, Binary) else ("input",)
    return [argument(site.node, name) for name in names]
