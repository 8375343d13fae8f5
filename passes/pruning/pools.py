"""Pools: weights that compete with each other, and what is kept of them round by round."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.passes.pruning.candidates import Candidate, pieces
from shohin.passes.pruning.selection import Scores, count_to_keep, keep_largest_of_each
from shohin.passes.pruning.units import Units


@dataclass(frozen=True, eq=False)
class Pool:
    """Weights that compete with each other, and the rule by which they are pruned.

    Attributes:
        units: the units of each weight.
        density: share of all units to keep in the end; 1 where a threshold decides.
        threshold: mean magnitude from which on a unit is kept; None where the density decides.
    """

    units: tuple[Units, ...]
    density: float
    threshold: float | None = None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The weights."""
        return tuple(units.candidate for units in self.units)

    @property
    def count(self) -> int:
        """Number of units."""
        return sum(units.count for units in self.units)

    def density_at(self, start: float, share: float) -> float:
        """The density after a share of the rounds; they go down geometrically.

        Args:
            start: density before the first round.
            share: rounds done over all rounds; 1 gives exactly `density`.
        """
        if share >= 1 or start <= self.density:
            return self.density
        return float(start * (self.density / start) ** share)


def masks_of(
    pool: Pool,
    values: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    density: float,
    share: float,
) -> dict[str, Tensor]:
    """What is kept of each weight of a pool in one round.

    Args:
        pool: the weights.
        values: what they are ranked by, by name and of their shapes; see `Units.scores`.
        held: what is left of them, by name; those that are not there are whole.
        density: share of all units to keep in this round. Of `n` units ``round(density * n)`` are
            kept, of equal scores the first; fewer only where fewer are left. Of each weight at
            least one is.
        share: rounds done over all rounds, with this one. A threshold grows in proportion to it.

    Returns:
        Bool tensors of the weights' shapes, by name.
    """
    scores = [units.scores(values[_name(units)], held.get(_name(units))) for units in pool.units]
    if pool.threshold is not None:
        kept = [_above(one, pool.threshold * share) for one in scores]
    else:
        kept = keep_largest_of_each(scores, count_to_keep(density, pool.count))
    masks = {}
    for units, chosen in zip(pool.units, kept, strict=True):
        mask, left = units.spread(chosen), held.get(_name(units))
        masks[_name(units)] = mask if left is None else mask & left
    return masks


def density_of(pool: Pool, held: Mapping[str, Tensor]) -> float:
    """Share of the elements of a pool that are left."""
    total = sum(candidate.weight.numel() for candidate in pool.candidates)
    left = sum(count_left(candidate, held) for candidate in pool.candidates)
    return left / max(1, total)


def count_left(candidate: Candidate, held: Mapping[str, Tensor]) -> int:
    """Number of elements that are left of a weight."""
    mask = held.get(candidate.name)
    return candidate.weight.numel() if mask is None else int(torch.count_nonzero(mask))


def deviation(weight: Tensor) -> float:
    """Standard deviation of a weight's elements, computed in float64 without a copy of them all."""
    total = squares = 0.0
    for piece in pieces(weight):
        wide = piece.double()
        total += float(wide.sum())
        squares += float(wide.square().sum())
    count = max(1, weight.numel())
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))


def pool_names(pools: Sequence[Pool]) -> tuple[str, ...]:
    """Names of the weights of all pools."""
    return tuple(candidate.name for pool in pools for candidate in pool.candidates)


def _name(units: Units) -> str:
    return units.candidate.name


def _above(scores: Scores, threshold: float) -> Tensor:
    """The units from a threshold on, or else the largest."""
    kept = torch.cat([piece >= threshold for piece in scores.pieces()])
    return kept if kept.any() else keep_largest_of_each([scores], 1)[0]
