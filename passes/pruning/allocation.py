"""Densities of layers from their sensitivity curves, under a target for the whole network.

One number says how hard to prune, and the curves make densities of it: the accuracy that every
layer on its own may cost. A layer that is sensitive then keeps much, one that is not keeps little.
The number is found by bisection, since all that the targets count falls as it grows.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from shohin.errors import PassError, ShohinWarning
from shohin.passes.analyses.sensitivity import LayerCurve, Sensitivity

Densities = dict[str, float]
_STEPS = 40
_MEASURED_STEPS = 8
_PROPORTIONAL = 1.0
_HARDEST = 2.0


@dataclass(frozen=True)
class Curve:
    """How little of a layer has to be kept for an accuracy.

    Attributes:
        densities: ascending; the last is 1.
        accuracies: at these densities, made to rise with the density.
    """

    densities: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def fall(self) -> float:
        """The accuracy that is lost at the lowest density."""
        return self.accuracies[-1] - self.accuracies[0]

    def density_for(self, loss: float) -> float:
        """The lowest density that costs no more than a loss of accuracy, between the measured."""
        wanted = self.accuracies[-1] - loss
        above = next(i for i, found in enumerate(self.accuracies) if found >= wanted)
        if above == 0:
            return self.densities[0]
        low, high = self.accuracies[above - 1], self.accuracies[above]
        part = (wanted - low) / (high - low)
        below = self.densities[above - 1]
        return below + part * (self.densities[above] - below)


def curve_of(measured: LayerCurve, full: float) -> Curve:
    """A measured curve, with its noise taken out.

    Args:
        measured: densities and accuracies; a layer that does better when it is pruned a little is
            taken to do no worse with more of it.
        full: accuracy of the whole network, at density 1.
    """
    points = {density: accuracy for density, accuracy in measured.points if density < 1}
    ordered = sorted(points.items())
    rising = [*accumulate((accuracy for _, accuracy in ordered), max)]
    accuracies = (*(min(full, accuracy) for accuracy in rising), full)
    return Curve((*(density for density, _ in ordered), 1.0), accuracies)


def densities_at(curves: Mapping[str, Curve], hardness: float) -> Densities:
    """Densities by how hard to prune.

    Args:
        curves: by weight name.
        hardness: from 1 to 2, how much accuracy a layer may cost, from none to the most that any
            was measured to. From 0 to 1 none is lost: layers go in proportion from density 1 to
            the lowest that costs nothing.
    """
    worst = max((curve.fall for curve in curves.values()), default=0.0)
    loss = max(0.0, hardness - _PROPORTIONAL) * worst
    part = min(1.0, hardness / _PROPORTIONAL)
    lowest = {name: curve.density_for(loss) for name, curve in curves.items()}
    return {name: least + (1 - part) * (1 - least) for name, least in lowest.items()}


def curves_of(sensitivity: Sensitivity, names: Sequence[str]) -> dict[str, Curve]:
    """The curves of some weights, by name; see `curve_of`."""
    return {
        layer.weight: curve_of(layer, sensitivity.baseline)
        for layer in sensitivity.layers
        if layer.weight in names
    }


def least_pruning(
    curves: Mapping[str, Curve],
    figure: Callable[[Densities], float],
    target: float,
    label: str,
    *,
    measured: bool = False,
) -> Densities:
    """The densities of the least pruning that meets a target.

    Args:
        curves: by weight name.
        figure: what a choice of densities comes to; falls with them.
        target: what it may be at most.
        label: what the figure is, for errors, e.g. ``share of the parameters``.
        measured: whether the figure takes long to find, so that a few tries have to do.

    Raises:
        PassError: when the lowest densities do not meet the target.
    """
    lowest = figure(densities_at(curves, _HARDEST))
    if lowest > target:
        problem = f"expected a {label} of {target:g}, got {lowest:.4g} at the lowest densities"
        raise PassError("prune scope 'sensitivity'", problem, "choose a higher target")
    low, high = 0.0, _HARDEST
    if figure(densities_at(curves, low)) <= target:
        text = f"prune: the {label} is within {target:g} without any pruning"
        warnings.warn(text, ShohinWarning, stacklevel=2)
        return densities_at(curves, low)
    for _ in range(_MEASURED_STEPS if measured else _STEPS):
        middle = (low + high) / 2
        if figure(densities_at(curves, middle)) <= target:
            high = middle
        else:
            low = middle
    return densities_at(curves, high)


def measured_densities(share: float | None) -> tuple[float, ...]:
    """The densities at which to measure the layers, ascending, 1 left out.

    Args:
        share: share of the whole network that is to be kept; None where it is not known. The
            lowest density is well below it, so that layers can make up for each other.
    """
    lowest = 0.02 if share is None else max(0.002, share / 4)
    low = [float(density) for density in np.geomspace(lowest, 0.5, 7)]
    return tuple(round(density, 4) for density in (*low, 0.75))
