"""Bits of each layer, under a target for the whole program.

Rate and distortion: with a price of a bit, every layer takes the number of bits for which error
plus price is least, and the price is found by bisection. Errors of layers are comparable where
they are weighted by the loss' second derivatives; without, each is taken relative to the squares
of its layer's weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shohin.errors import PassError
from shohin.passes.sharing.layers import Layer, Sharing

_STEPS = 40
_EVALUATIONS = 8


@dataclass(frozen=True)
class Option:
    """One number of bits for a layer.

    Attributes:
        bits: width of an index.
        error: comparable between layers.
        coded_bits: of indices and centroids, entropy coded.
    """

    bits: int
    error: float
    coded_bits: float


def option_of(sharing: Sharing, relative: bool) -> Option:
    """What a sharing of a layer costs."""
    scale = float((sharing.layer.values.astype(float) ** 2).sum()) if relative else 1.0
    return Option(sharing.bits, sharing.error / (scale or 1.0), sharing.coded_bits)


def bits_at(options: Mapping[str, Sequence[Option]], price: float) -> dict[str, int]:
    """Bits of each layer, where a coded bit costs so much error."""

    def best(found: Sequence[Option]) -> int:
        return min(found, key=lambda one: (one.error + price * one.coded_bits, one.bits)).bits

    return {name: best(found) for name, found in options.items()}


def coded_bytes(options: Mapping[str, Sequence[Option]], bits: Mapping[str, int]) -> float:
    """Entropy-coded size of all layers with so many bits each."""
    chosen = (next(o for o in found if o.bits == bits[name]) for name, found in options.items())
    return sum(one.coded_bits for one in chosen) / 8


def bits_for_bytes(options: Mapping[str, Sequence[Option]], most: float) -> dict[str, int]:
    """The bits with the least error whose entropy-coded size is within a number of bytes.

    Raises:
        PassError: when it is not, at the fewest bits.
    """
    dearest = _dearest(options)
    least = coded_bytes(options, bits_at(options, dearest))
    if least > most:
        problem = f"expected at most {most:.0f} bytes, got {least:.0f} at the fewest bits"
        raise PassError("share-weights target_bytes", problem, "prune first, or choose more")
    return _cheapest(options, lambda bits: coded_bytes(options, bits) <= most, _STEPS)


def bits_for_drop(
    options: Mapping[str, Sequence[Option]], acceptable: Callable[[Mapping[str, int]], bool]
) -> dict[str, int]:
    """The fewest bits that are acceptable, in a few evaluations.

    Raises:
        PassError: when the most bits are not.
    """
    if not acceptable(bits_at(options, 0.0)):
        problem = "the target is not met with the most bits"
        raise PassError("share-weights target_drop", problem, "choose a larger drop")
    low, high = 0.0, _dearest(options)
    best = bits_at(options, low)
    for _ in range(_EVALUATIONS):
        middle = _between(low, high)
        found = bits_at(options, middle)
        if acceptable(found):
            low, best = middle, found
        else:
            high = middle
    return best


def _cheapest(
    options: Mapping[str, Sequence[Option]],
    fits: Callable[[Mapping[str, int]], bool],
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


def _dearest(options: Mapping[str, Sequence[Option]]) -> float:
    """A price at which every layer takes the fewest bits."""
    worst = max((one.error for found in options.values() for one in found), default=0.0)
    sizes = [sorted(one.coded_bits for one in found) for found in options.values()]
    steps = [b - a for found in sizes for a, b in pairwise(found) if b > a]
    return (worst + 1e-30) / min(steps, default=1.0)


def options_of(
    layers: Sequence[Layer], cluster: Callable[[Layer, int], Sharing], widths: Sequence[int]
) -> dict[str, list[Option]]:
    """Every option of every layer.

    Args:
        layers: the weights.
        cluster: shares a weight's values with so many bits.
        widths: the bits to try.
    """
    found = {}
    for layer in layers:
        relative = layer.importance is None
        found[layer.name] = [option_of(cluster(layer, bits), relative) for bits in widths]
    return found
