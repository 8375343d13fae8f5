"""Which ranks the layers of a network get."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
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
        for done in count():
            chosen = self._select(choices, self.budget)
            slower = self._slower(chosen)
            if not slower:
                break
            for layer in slower:
                name, options = layer.name, choices[layer.name]
                self.refused[name] = chosen[name]
                # After a while what is refused is out for good, so that this ends.
                left = self._faster(layer, options, chosen[name]) if done < _ROUNDS else options[:1]
                choices[name] = left
        return chosen

    def _select(self, choices: Mapping[str, Sequence[Choice]], budget: Budget) -> dict[str, Ranks]:
        now = sum(self._cost(layer, Ranks(), budget.unit) for layer in self.layers)
        rest = max(0.0, budget.total - now)
        choose = select_evenly if budget.evenly else select
        found = choose(choices, budget.most - rest)
        if found is None:
            least = [min(one.cost for one in options) for options in choices.values()]
            raise PassError(*_unreachable(budget, rest + sum(least), self._refusals()))
        return {name: choice.ranks for name, choice in found.items()}

    def _refusals(self) -> str:
        """The layers that got no faster, and their times, for an error."""
        if self.table is None or not self.refused:
            return ""
        layers = {layer.name: layer for layer in self.layers}
        times = [
            f"{name} takes {self.table.milliseconds(layers[name], Ranks()):.3g} ms, and"
            f" {self.table.milliseconds(layers[name], ranks):.3g}"
            f" at {layers[name].shape.text(ranks)}"
            for name, ranks in self.refused.items()
        ]
        return f"; not faster: {'; '.join(times)}"

    def _choices(self, layer: Layer, unit: Unit) -> list[Choice]:
        forms = [*rank_choices(layer.shape, self.scheme, self.multiple)]
        if layer.name in self.given:
            forms = [Ranks(), self.given[layer.name]]
        elif unit == "ms":
            forms = self._thinned(layer, forms)
        if unit == "ms":
            self._need_table().measure([(layer, form) for form in forms])
        energies = self.energies[layer.name]
        found = [Choice(one, self._cost(layer, one, unit), energies.loss(one)) for one in forms]
        if layer.name in self.given:
            return found[1:]
        return [found[0], *(one for one in found[1:] if one.cost < found[0].cost)]

    def _faster(self, layer: Layer, options: Sequence[Choice], refused: Ranks) -> list[Choice]:
        """The choices that are likely to be faster than the layer as it was.

        A few of those with fewer operations than the refused one are measured; what lies between
        them takes about what they do.
        """
        table = self._need_table()
        limit = layer.shape.macs(refused)
        cheaper = [one for one in options[1:] if layer.shape.macs(one.ranks) < limit]
        tried = self._thinned(layer, [Ranks(), *(one.ranks for one in cheaper)])[1:]
        table.measure([(layer, form) for form in tried])
        before = table.milliseconds(layer, Ranks())
        faster = [form for form in tried if table.milliseconds(layer, form) < before]
        most = max((layer.shape.macs(form) for form in faster), default=0)
        return [options[0], *(one for one in cheaper if layer.shape.macs(one.ranks) <= most)]

    def _thinned(self, layer: Layer, forms: Sequence[Ranks]) -> list[Ranks]:
        """A few of the forms that are best by multiply-accumulates."""
        energies = self.energies[layer.name]
        hull = lower_hull(
            [Choice(one, layer.shape.macs(one), energies.loss(one)) for one in forms]
        )[1:]
        most = min(len(hull), _MEASURED_CHOICES)
        places = [round(i * (len(hull) - 1) / max(1, most - 1)) for i in range(most)]
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


def _unreachable(budget: Budget, reached: float, refusals: str) -> tuple[str, str, str]:
    unit = {"macs": "multiply-accumulates", "parameters": "weights", "ms": "milliseconds"}
    option = {"macs": "speedup", "parameters": "parameters", "ms": "latency"}[budget.unit]
    numbers = ".4g" if budget.unit == "ms" else ",.0f"
    problem = (
        f"expected at most {budget.most:{numbers}} {unit[budget.unit]}, and the least that can be"
        f" chosen leaves {reached:{numbers}}{refusals}"
    )
    if budget.unit == "macs":
        choose = f"choose at most {max(1.0, math.floor(100 * budget.total / reached) / 100):g}"
    else:
        choose = f"choose at least {min(1.0, math.ceil(100 * reached / budget.total) / 100):g}"
    others = "a smaller 'multiple', or exclude fewer layers"
    return f"low-rank {option}", problem, f"{choose}, {others}"
