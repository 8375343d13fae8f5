"""Ranks that the user gives single layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shohin.errors import SpecError
from shohin.passes.base import Context
from shohin.passes.factoring.factors import Ranks, Scheme
from shohin.passes.factoring.layers import Layer
from shohin.passes.pruning.candidates import value_for_names
from shohin.passes.remarks import Reason

RANK_OPTIONS: Mapping[str, tuple[Scheme, ...]] = {
    "ranks": ("channel", "3d", "bottleneck"),
    "spatial_ranks": ("spatial", "3d"),
    "inner_ranks": ("bottleneck",),
}
"""Options that give ranks, in the order of `Ranks`, and the schemes that have such a step."""


@dataclass(frozen=True)
class GivenRanks:
    """The options that give ranks.

    Attributes:
        scheme: how layers are split.
        options: by option, ranks by weight name or shell pattern.
    """

    scheme: Scheme
    options: Mapping[str, Mapping[str, int]]

    def of(self, layers: Sequence[Layer], context: Context) -> dict[str, Ranks]:
        """The ranks of the layers that have some, by name.

        A pattern may match layers that cannot have such a rank, which a remark says.

        Raises:
            SpecError: when a rank that is given by name is out of range, or some of the ranks that
                a layer needs are given and others are not.
        """
        found = {}
        for layer in layers:
            ranks = self._ranks(layer)
            problem = _out_of_range(layer, ranks)
            if problem is not None and self._is_named(layer):
                raise SpecError(*problem)
            if problem is not None:
                detail = f"{layer.name} is not split: {problem[1]}"
                context.skipped(layer.node, Reason.NOT_APPLICABLE, detail)
            elif ranks.split:
                found[layer.name] = ranks
        return found

    def remark_others(self, layers: Sequence[Layer], context: Context) -> None:
        """Remark on the layers that no option gives a rank."""
        for layer in layers:
            if not self._ranks(layer).split:
                detail = f"{layer.name} has no rank in the options"
                context.skipped(layer.node, Reason.EXCLUDED_BY_OPTION, detail)

    def _ranks(self, layer: Layer) -> Ranks:
        wanted = [name for name, schemes in RANK_OPTIONS.items() if self.scheme in schemes]
        if not layer.shape.is_spatial and self.scheme != "spatial":
            wanted = ["ranks"]
        spellings = layer.candidate.spellings
        values = {name: value_for_names(spellings, self.options[name]) for name in wanted}
        lacking = [name for name, value in values.items() if value is None]
        if lacking and (len(lacking) < len(wanted) or self._is_named(layer)):
            problem = f"scheme={self.scheme} needs a rank of {layer.name} in it, too"
            raise SpecError(f"low-rank {lacking[0]}", problem)
        return Ranks(*(values.get(name) for name in RANK_OPTIONS))

    def _is_named(self, layer: Layer) -> bool:
        """Whether an option gives the layer a rank by its name, rather than by a pattern."""
        spellings = layer.candidate.spellings
        return any(name in given for given in self.options.values() for name in spellings)


def _out_of_range(layer: Layer, ranks: Ranks) -> tuple[str, str] | None:
    """Where a rank is given that a layer cannot have, and what is wrong; None where none is."""
    full = layer.shape.full(ranks)
    pairs = (
        (ranks.channel, full.channel),
        (ranks.spatial, full.spatial),
        (ranks.inner, full.inner),
    )
    for option, (rank, limit) in zip(RANK_OPTIONS, pairs, strict=True):
        if rank is not None and limit is not None and rank > limit:
            return f"low-rank {option}", f"expected at most {limit} of {layer.name}, got {rank}"
    return None
