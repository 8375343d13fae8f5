"""How much each layer is split, so that a network meets a budget.

Zhang et al. (arXiv 1505.06798, section 2.3) maximise the product over the layers of the share of
the energy that is kept, and drop, again and again, the eigenvalue that loses least of it for the
cost that it saves. Here the layer as it was is one of the choices, which a chain of nearly full
rank does not improve on, so that steps are taken along the lower convex hull of each layer's
choices. Between two choices of a hull the order is that of the paper.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from shohin.passes.factoring.factors import Ranks

_BISECTIONS = 40


@dataclass(frozen=True)
class Choice:
    """One way to split a layer.

    Attributes:
        ranks: how.
        cost: what it costs, in units of the budget.
        loss: negative logarithm of the energy that it keeps.
    """

    ranks: Ranks
    cost: float
    loss: float


def select(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice] | None:
    """Choices of least loss for all layers together, within a budget.

    Args:
        choices: of each layer, the layer as it was first.
        budget: what all may cost together.

    Returns:
        One of each layer; None where even the cheapest cost more.
    """
    chosen = {name: options[0] for name, options in choices.items()}
    spent = sum(choice.cost for choice in chosen.values())
    for _, name, choice in _steps(choices):
        if spent <= budget:
            break
        spent += choice.cost - chosen[name].cost
        chosen[name] = choice
    if spent > budget:
        return None
    return _refine(choices, chosen, budget - spent)


def select_evenly(
    choices: Mapping[str, Sequence[Choice]], budget: float
) -> dict[str, Choice] | None:
    """Choices that cost the same share of every layer, as nearly as they allow.

    Arguments and result are those of `select`.
    """
    whole = {name: options[0] for name, options in choices.items()}
    if sum(choice.cost for choice in whole.values()) <= budget:
        return whole
    low, high = 0.0, 1.0
    cheapest = {name: min(options, key=lambda one: one.cost) for name, options in choices.items()}
    if sum(choice.cost for choice in cheapest.values()) > budget:
        return None
    found = cheapest
    for _ in range(_BISECTIONS):
        share = (low + high) / 2
        tried = {name: _within(options, share) for name, options in choices.items()}
        if sum(choice.cost for choice in tried.values()) <= budget:
            low, found = share, tried
        else:
            high = share
    return found


def _within(options: Sequence[Choice], share: float) -> Choice:
    """The choice of least loss that costs at most a share of the layer as it was."""
    limit = share * options[0].cost
    fitting = [one for one in options if one.cost <= limit]
    return min(fitting or [min(options, key=lambda one: one.cost)], key=lambda one: one.loss)


def _steps(choices: Mapping[str, Sequence[Choice]]) -> list[tuple[float, str, Choice]]:
    """Steps along the hulls of all layers: loss per cost saved, layer, choice after it."""
    steps = []
    for name, options in choices.items():
        hull = lower_hull(options)
        for before, after in pairwise(hull):
            slope = (after.loss - before.loss) / (before.cost - after.cost)
            steps.append((slope, name, after))
    return sorted(steps, key=lambda step: step[0])


def lower_hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices that are best for some price of cost, dearest first, from the first one on."""
    hull = [options[0]]
    rest = [one for one in options[1:] if one.cost < options[0].cost]
    for one in sorted(rest, key=lambda one: (-one.cost, one.loss)):
        if one.cost == hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], one) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(one)
    return hull


def _slope(before: Choice, after: Choice) -> float:
    return (after.loss - before.loss) / (before.cost - after.cost)


def _refine(
    choices: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], left: float
) -> dict[str, Choice]:
    """Spend what is left of a budget where it takes most of the loss."""
    while True:
        better = [
            (chosen[name].loss - one.loss, -index, name, one)
            for index, (name, options) in enumerate(choices.items())
            for one in options
            if one.loss < chosen[name].loss and one.cost - chosen[name].cost <= left
        ]
        if not better:
            return chosen
        _, _, name, one = max(better, key=lambda found: found[:2])
        left -= one.cost - chosen[name].cost
        chosen[name] = one
