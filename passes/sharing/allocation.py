"""Bits of each layer, under a target for the whole program.

Rate and distortion: with a price of a byte, every layer takes the number of bits for which error
plus price is least, and the price is found by bisection. Errors of layers are comparable where
they are weighted by the loss' second derivatives; where a layer has no weights of errors, those of
every layer are taken relative to the squares of its elements.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

from shohin.errors import PassError
from shohin.passes.sharing.layers import Layer, Sharing

_DROP = "share-weights target_drop"
_STEPS = 40
_EVALUATIONS = 8


@dataclass(frozen=True)
class Option:
    """One number of bits for a layer.

    Attributes:
        bits: width of an index.
        error: comparable between layers.
        coded_bytes: size of the weight, entropy coded.
    """

    bits: int
    error: float
    coded_bytes: int


Options: TypeAlias = Mapping[str, Sequence[Option]]
Bits: TypeAlias = Mapping[str, int]


def option_of(sharing: Sharing, relative: bool) -> Option:
    """What a sharing of a layer costs; where it is not smaller, the layer stays as it is."""
    if not sharing.smaller:
        return Option(sharing.bits, 0.0, sharing.layer.coded_bytes)
    scale = sharing.layer.energy if relative else 1.0
    return Option(sharing.bits, sharing.error / (scale or 1.0), sharing.coded_bytes)


def bits_at(options: Options, price: float) -> dict[str, int]:
    """Bits of each layer, where a byte costs so much error."""

    def best(found: Sequence[Option]) -> int:
        return min(found, key=lambda one: (one.error + price * one.coded_bytes, one.bits)).bits

    return {name: best(found) for name, found in options.items()}


def coded_bytes(options: Options, bits: Bits) -> int:
    """Entropy-coded size of all layers with so many bits each."""
    chosen = (next(o for o in found if o.bits == bits[name]) for name, found in options.items())
    return sum(one.coded_bytes for one in chosen)


def bits_for_bytes(options: Options, most: float) -> dict[str, int]:
    """The bits with the least error whose entropy-coded size is within a number of bytes.

    Where no bits are, those for the smallest size.
    """
    bits = _cheapest(options, lambda bits: coded_bytes(options, bits) <= most, _STEPS)
    chosen = {
        name: next(one for one in found if one.bits == bits[name])
        for name, found in options.items()
    }
    _spend(options, chosen, most - coded_bytes(options, bits))
    return {name: one.bits for name, one in chosen.items()}


def _spend(options: Options, chosen: dict[str, Option], left: float) -> None:
    """Spend bytes that are left where they gain most: no price gives every size there is."""
    while True:
        better = [
            ((chosen[name].error - one.error) / more, name, one, more)
            for name, found in options.items()
            for one in found
            if one.error < chosen[name].error
            and 0 < (more := one.coded_bytes - chosen[name].coded_bytes) <= left
        ]
        if not better:
            return
        _, name, one, more = max(better, key=lambda entry: entry[:2])
        chosen[name], left = one, left - more


def bits_for_drop(options: Options, measure: Callable[[Bits], float], least: float) -> Bits:
    """The fewest bits with which a measure is high enough, in a few evaluations.

    Args:
        options: of each layer.
        measure: tells what bits come to; one that is NaN is not high enough.
        least: what it has to be at least.

    Raises:
        PassError: when it is lower with the most bits, with both numbers.
    """
    best = bits_at(options, 0.0)
    found = measure(best)
    if not found >= least:
        problem = f"expected an evaluation of at least {least:.6g}, got {found:.6g}"
        hint = "choose a larger drop, or exclude the most sensitive weights"
        raise PassError(_DROP, f"{problem} with the most bits", hint)
    low, high = 0.0, _dearest(options)
    for _ in range(_EVALUATIONS):
        middle = _between(low, high)
        fewer = bits_at(options, middle)
        if fewer == best or measure(fewer) >= least:
            low, best = middle, fewer
        else:
            high = middle
    return best


def check_finite(evaluation: float) -> None:
    """Refuse an evaluation of the program as it is that nothing can be compared with.

    Raises:
        PassError: when it is NaN or infinite.
    """
    if not math.isfinite(evaluation):
        problem = f"expected a finite number from the evaluate function, got {evaluation}"
        raise PassError(_DROP, problem, "look at what it returns for the program as it is")


def _cheapest(
    options: Options,
    fits: Callable[[Bits], bool],
    steps: int,
) -> dict[str, int]:
    low, high = 0.0, _dearest(options)
    if fits(bits_at(options, low)):
        return bits_at(options, low)
    for _ in range(steps):
        middle = _between(low, high)
        if fits(bits_at(options, middle)):
            high = middle
        else:
            low = middle
    return bits_at(options, high)


def _between(low: float, high: float) -> float:
    """The geometric mean, since prices span many orders of magnitude."""
    floor = high * 1e-12
    return float((max(low, floor) * high) ** 0.5)


def _dearest(options: Options) -> float:
    """A price at which every layer takes the fewest bits."""
    worst = max((one.error for found in options.values() for one in found), default=0.0)
    sizes = [sorted(one.coded_bytes for one in found) for found in options.values()]
    steps = [b - a for found in sizes for a, b in pairwise(found) if b > a]
    return (worst + 1e-30) / min(steps, default=1.0)


def options_of(
    layers: Sequence[Layer],
    cluster: Callable[[Layer, int], Sharing],
    widths: Callable[[Layer], Sequence[int]],
) -> dict[str, list[Option]]:
    """Every option of every layer.

    Args:
        layers: the weights.
        cluster: shares a weight's values with so many bits.
        widths: the bits to try for a weight.
    """
    # Errors weighted by the loss or by inputs are no match for plain ones.
    relative = any(layer.importance is None for layer in layers)
    return {
        layer.name: [option_of(cluster(layer, bits), relative) for bits in widths(layer)]
        for layer in layers
    }
