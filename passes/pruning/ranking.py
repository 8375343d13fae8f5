"""What is kept in a round, by each of the methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypedDict

from torch import Tensor

from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import Program, Stage, tensor_of
from shohin.passes.base import Context, Progress
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.obd import saliencies
from shohin.passes.pruning.obs import balance_densities, prune_layers
from shohin.passes.pruning.pools import Pool, count_left, density_of, masks_of
from shohin.passes.pruning.selection import count_to_keep
from shohin.passes.pruning.units import Units

Method: TypeAlias = Literal["magnitude", "obd", "obs"]


class _Options(TypedDict):
    """Of `obs`."""

    damping: float
    seed: int
    progress: Progress


@dataclass(frozen=True, eq=False)
class Ranking:
    """How weights are chosen.

    Attributes:
        method: ``magnitude`` and ``obd`` rank weights, ``obs`` also corrects those it keeps.
        pools: the weights that compete with each other.
        starts: density of each pool before the first round.
        damping: of ``obs``.
    """

    method: Method
    pools: tuple[Pool, ...]
    starts: tuple[float, ...]
    damping: float

    @property
    def units(self) -> tuple[Units, ...]:
        """The units of the weights of all pools."""
        return tuple(units for pool in self.pools for units in pool.units)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The weights of all pools."""
        return tuple(candidate for pool in self.pools for candidate in pool.candidates)

    def choose(
        self, program: Program, held: Mapping[str, Tensor], share: float, context: Context
    ) -> dict[str, Tensor]:
        """What is kept of each weight in a round.

        Args:
            program: the program; ``obs`` changes its weights and biases.
            held: what is left of its weights, by name; those that are not there are whole.
            share: rounds done over all rounds, with this one.
            context: calibration batches, progress, and the sites that may be changed.

        Returns:
            Bool tensors of the weights' shapes, by name.
        """
        densities = [
            pool.density_at(start, share)
            for pool, start in zip(self.pools, self.starts, strict=True)
        ]
        if self.method == "obs":
            return self._reconstruct(program, held, densities, context)
        values = self._values(program, held, context)
        masks: dict[str, Tensor] = {}
        for pool, density in zip(self.pools, densities, strict=True):
            masks |= masks_of(pool, values, held, density, share)
        return masks

    def _values(
        self, program: Program, held: Mapping[str, Tensor], context: Context
    ) -> Mapping[str, Tensor]:
        if self.method == "magnitude":
            return {candidate.name: candidate.weight.detach() for candidate in self.candidates}
        names = [candidate.name for candidate in self.candidates]
        return saliencies(program, names, context.calibration, context.progress)

    def _reconstruct(
        self,
        program: Program,
        held: Mapping[str, Tensor],
        densities: Sequence[float],
        context: Context,
    ) -> dict[str, Tensor]:
        known = replace(program, encodings=encodings_of(program, held), stage=Stage.ANNOTATED)
        options: _Options = {
            "damping": self.damping,
            "seed": context.seed,
            "progress": context.progress,
        }
        together: dict[str, float] = {}
        for pool, density in zip(self.pools, densities, strict=True):
            wanted = _wanted(pool, density, held, context)
            if len(pool.units) > 1 and wanted:
                wanted = balance_densities(known, wanted, context.calibration, **options)
            together |= wanted
        # One call for all, since it measures the responses that it corrects for on the network
        # that it is given.
        return prune_layers(known, together, context.calibration, **options) if together else {}


def _wanted(
    pool: Pool, density: float, held: Mapping[str, Tensor], context: Context
) -> dict[str, float]:
    """The density of each weight that may be changed; none where nothing is to be dropped."""
    left = sum(count_left(candidate, held) for candidate in pool.candidates)
    if count_to_keep(density, pool.count) >= left:
        return {}
    alone = len(pool.units) == 1
    return {
        candidate.name: max(density, 1 / candidate.weight.numel()) if alone else density
        for candidate in pool.candidates
        if context.allows(candidate.node.name)
    }


def ranking_of(
    method: Method, pools: Sequence[Pool], held: Mapping[str, Tensor], damping: float
) -> Ranking:
    """A ranking whose rounds start from what is left of the weights now."""
    starts = tuple(density_of(pool, held) for pool in pools)
    return Ranking(method, tuple(pools), starts, damping)


def held_masks(program: Program, candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    """The masks of the candidates that are stored as sparse already, by name."""
    encodings = {one.name: program.encodings.get(one.name) for one in candidates}
    return {name: held.mask for name, held in encodings.items() if isinstance(held, Sparse)}


def encodings_of(program: Program, masks: Mapping[str, Tensor]) -> dict[str, Encoding]:
    """A program's encodings, with those of masked weights made from what they are now."""
    made = {
        name: Sparse.from_dense(tensor_of(program.module, name), mask)
        for name, mask in masks.items()
    }
    return {**program.encodings, **made}
