"""Which ranks the layers of a network get."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from shohin.errors import PassError
from shohin.passes.base import Context
from shohin.passes.factoring.energies import Energies, rank_choices
from shohin.passes.factoring.factors import Ranks, Scheme
from shohin.passes.factoring.latency import LatencyTable
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.selection import Choice, lower_hull, select, select_evenly

Unit: TypeAlias = Literal["macs", "parameters", "ms"]

_ROUNDS = 6
_MEASURED_CHOICES = 8
"""Forms of a layer that are measured where a budget is one of time."""


@dataclass(frozen=True)
class Budget:
    """What the layers of a network may cost together.

    Attributes:
        unit: multiply-accumulates at batch 1, weights, or milliseconds.
        total: of the whole network as it was, everything counted.
        most: of the whole network afterwards.
        evenly: whether every layer gives the same share, rather than those that lose least most.
    """

    unit: Unit
    total: float
    most: float
    evenly: bool = False


@dataclass(eq=False)
class Planner:
    """Chooses ranks.

    Attributes:
        layers: the layers that can be split.
        energies: of each of them, by name.
        scheme: how layers are split.
        multiple: what ranks are multiples of.
        given: ranks that the user chose, by name; other layers stay as they are without a budget.
        budget: what all may cost; None where only given ranks count.
        table: milliseconds of layers; None to believe multiply-accumulates.
        context: where remarks go.
        refused: by name, ranks at which a layer was no faster.
    """

    layers: Sequence[Layer]
    energies: Mapping[str, Energies]
    scheme: Scheme
    multiple: int
    given: Mapping[str, Ranks]
    budget: Budget | None
    table: LatencyTable | None
    context: Context
    refused: dict[str, Ranks] = field(default_factory=dict)

    def plan(self) -> dict[str, Ranks]:
        """Ranks of every layer.

        Raises:
            PassError: when the budget cannot be met.
        """
        if self.budget is None:
            chosen = {layer.name: self.given.get(layer.name, Ranks()) for layer in self.layers}
            self._measure(chosen)
            return chosen
        choices = {layer.name: self._choices(layer, self.budget.unit) for layer in self.layers}
        for _ in range(_ROUNDS):
            chosen = self._select(choices, self.budget)
            slower = self._slower(chosen)
            if not slower:
                return chosen
            for layer in slower:
                self.refused[layer.name] = chosen[layer.name]
                choices[layer.name] = self._cheaper(choices[layer.name], chosen[layer.name])
        left = {layer.name for layer in self._slower(chosen)}
        return {name: Ranks() if name in left else ranks for name, ranks in chosen.items()}

    def _select(self, choices: Mapping[str, Sequence[Choice]], budget: Budget) -> dict[str, Ranks]:
        now = sum(self._cost(layer, Ranks(), budget.unit) for layer in self.layers)
        rest = max(0.0, budget.total - now)
        choose = select_evenly if budget.evenly else select
        found = choose(choices, budget.most - rest)
        least = {name: min(options, key=lambda one: one.cost) for name, options in choices.items()}
        if found is None and not self.refused:
            reached = rest + sum(choice.cost for choice in least.values())
            raise PassError(*_unreachable(budget, reached))
        if found is None:
            self.context.noted("budget", "what is left of the layers that get faster is too little")
        return {name: choice.ranks for name, choice in (found or least).items()}

    def _choices(self, layer: Layer, unit: Unit) -> list[Choice]:
        if layer.name in self.given:
            forms = [self.given[layer.name]]
        else:
            forms = [*rank_choices(layer.shape, self.scheme, self.multiple)]
        if unit == "ms":
            forms = self._thinned(layer, forms)
            self._need_table().measure([(layer, form) for form in forms])
        energies = self.energies[layer.name]
        found = [Choice(one, self._cost(layer, one, unit), energies.loss(one)) for one in forms]
        return [found[0], *(one for one in found[1:] if one.cost < found[0].cost)]

    def _thinned(self, layer: Layer, forms: Sequence[Ranks]) -> list[Ranks]:
        """A few of the forms that are best by multiply-accumulates."""
        energies = self.energies[layer.name]
        hull = lower_hull(
            [Choice(one, layer.shape.macs(one), energies.loss(one)) for one in forms]
        )[1:]
        count = min(len(hull), _MEASURED_CHOICES)
        places = [round(i * (len(hull) - 1) / max(1, count - 1)) for i in range(count)]
        return [forms[0], *(hull[place].ranks for place in dict.fromkeys(places))]

    def _cost(self, layer: Layer, ranks: Ranks, unit: Unit) -> float:
        if unit == "ms":
            return self._need_table().milliseconds(layer, ranks)
        return layer.shape.macs(ranks) if unit == "macs" else layer.shape.weights(ranks)

    def _need_table(self) -> LatencyTable:
        if self.table is None:
            raise PassError("low-rank latency", "there is nothing to measure milliseconds with")
        return self.table

    def _measure(self, chosen: Mapping[str, Ranks]) -> None:
        if self.table is not None:
            split = [(one, chosen[one.name]) for one in self.layers if chosen[one.name].split]
            self.table.measure([*((layer, Ranks()) for layer, _ in split), *split])

    def _slower(self, chosen: Mapping[str, Ranks]) -> list[Layer]:
        """The layers that were chosen to be split and are no faster for it."""
        if self.table is None:
            return []
        self._measure(chosen)
        table = self.table
        return [
            layer
            for layer in self.layers
            if chosen[layer.name].split
            and layer.name not in self.given
            and table.milliseconds(layer, chosen[layer.name]) >= table.milliseconds(layer, Ranks())
        ]

    def _cheaper(self, options: Sequence[Choice], refused: Ranks) -> list[Choice]:
        cost = next(one.cost for one in options if one.ranks == refused)
        return [options[0], *(one for one in options[1:] if one.cost < cost)]


def _unreachable(budget: Budget, reached: float) -> tuple[str, str, str]:
    unit = {"macs": "multiply-accumulates", "parameters": "weights", "ms": "milliseconds"}
    option = {"macs": "speedup", "parameters": "parameters", "ms": "latency"}[budget.unit]
    share = budget.total / reached if budget.unit == "macs" else reached / budget.total
    numbers = ".4g" if budget.unit == "ms" else ",.0f"
    problem = (
        f"expected at most {budget.most:{numbers}} {unit[budget.unit]}, and the least ranks leave"
        f" {reached:{numbers}}"
    )
    limit = math.floor(share * 100) / 100 if budget.unit == "macs" else math.ceil(share * 100) / 100
    side = "at most" if budget.unit == "macs" else "at least"
    return f"low-rank {option}", problem, f"choose {side} {limit:g}, or exclude fewer layers"
