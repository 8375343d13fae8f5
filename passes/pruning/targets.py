"""What a network pruned to some densities comes to: parameters, operations, milliseconds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shohin.errors import ArtifactError, SpecError
from shohin.ir.files import atomic_path
from shohin.ir.program import Program
from shohin.ir.serialise import content_hash
from shohin.passes.analyses.cost import cost
from shohin.passes.base import Context
from shohin.passes.pruning.allocation import (
    Densities,
    curves_of,
    least_pruning,
    measured_densities,
)
from shohin.passes.pruning.candidates import Candidate, find_candidates
from shohin.passes.pruning.measuring import measure_units
from shohin.passes.pruning.pools import Pool, count_left, masks_of
from shohin.passes.pruning.ranking import held_masks
from shohin.passes.pruning.result import encoded
from shohin.passes.pruning.selection import count_to_keep
from shohin.passes.pruning.units import Granularity, Units, units_of

Figure: TypeAlias = Literal["parameters", "macs", "ms"]


@dataclass(frozen=True)
class Target:
    """How small or fast a network is to become.

    Attributes:
        figure: ``parameters`` and ``macs`` of its convolutions and linear maps, as the share that
            is kept; or ``ms``, measured milliseconds at batch 1.
        most: the figure may be this at most.
        device: the target, as text, that milliseconds are measured on.
        granularity: what is pruned as one, which decides how fast the compiled network is.
        block: shape of a block.
        by_magnitude: whether the magnitudes as they are now decide what is kept. Otherwise the
            figure is that of the largest units.
    """

    figure: Figure
    most: float
    device: str
    granularity: Granularity
    block: str
    by_magnitude: bool

    @property
    def label(self) -> str:
        """What the figure is, for people."""
        names = {
            "parameters": "share of the parameters",
            "macs": "share of the multiply-accumulates",
            "ms": f"time in milliseconds on {self.device}",
        }
        return names[self.figure]


def allocate(
    program: Program,
    layers: Sequence[Candidate],
    free: Sequence[Candidate],
    given: Mapping[str, float],
    target: Target,
    context: Context,
) -> Densities:
    """Choose densities from sensitivity curves so that the whole network meets a target.

    Args:
        program: the program; not changed.
        layers: every convolution and linear weight.
        free: those whose density is to be chosen.
        given: densities of others, by name; what is in neither is left as it is.
        target: what to reach, with as little pruning as does it.
        context: gives `evaluate`, `measure`, the work directory and the progress callback.

    Returns:
        Densities of the free weights, by name.

    Raises:
        PassError: when the target cannot be reached.
        SpecError: when the context lacks what is needed, or an evaluation is not finite.
    """
    if context.evaluate is None:
        raise SpecError("prune scope", "sensitivity curves need an evaluate function, got none")
    if not free:
        return {}
    file = _file(program, free, given, target, context)
    found = _read(file) if context.resume else None
    if found is None:
        found = _search(program, layers, free, given, target, context)
        _write(file, found)
    shown = ", ".join(f"{name} {density:.3g}" for name, density in found.items())
    context.noted("densities", f"densities from sensitivity curves: {shown}")
    return found


def _search(
    program: Program,
    layers: Sequence[Candidate],
    free: Sequence[Candidate],
    given: Mapping[str, float],
    target: Target,
    context: Context,
) -> Densities:
    if context.evaluate is None:
        raise SpecError("prune scope", "sensitivity curves need an evaluate function, got none")
    measured = target.figure == "ms"
    weights = [units_of(one, target.granularity, target.block) for one in free]
    densities = measured_densities(None if measured else target.most)
    sensitivity = measure_units(program, weights, densities, context.evaluate, context)
    sizes = [] if measured else _sizes(program, layers, target, context)

    def figure(densities: Densities) -> float:
        chosen = {**given, **densities}
        if measured:
            return _milliseconds(program, chosen, target, context)
        return _share(sizes, chosen)

    curves = curves_of(sensitivity, [candidate.name for candidate in free])
    return least_pruning(curves, figure, target.most, target.label, measured=measured)


def _file(
    program: Program,
    free: Sequence[Candidate],
    given: Mapping[str, float],
    target: Target,
    context: Context,
) -> Path | None:
    """Where densities are kept, since the next measurement might lead to others."""
    if context.workdir is None or context.site_filter is not None:
        return None
    names = [candidate.name for candidate in free]
    identity = [content_hash(program), astuple(target), names, sorted(given.items())]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return context.workdir / f"prune-densities-{key[:32]}.json"


def _read(file: Path | None) -> Densities | None:
    if file is None or not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): float(density) for name, density in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(str(file), f"cannot be read: {error}", "remove it") from error


def _write(file: Path | None, densities: Densities) -> None:
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(densities, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class _Size:
    """What a weight counts in a share.

    Attributes:
        units: its units.
        left: number of its elements that are left now.
        each: what each element counts.
        elements: number of elements in so many units; None where units are elements.
    """

    units: Units
    left: int
    each: float
    elements: Tensor | None

    def kept(self, density: float) -> float:
        """What is kept of it."""
        count = count_to_keep(density, self.units.count)
        if density >= 1 or count == 0:
            return self.left * self.each
        most = count if self.elements is None else int(self.elements[count - 1])
        return min(self.left, most) * self.each


def _sizes(
    program: Program, layers: Sequence[Candidate], target: Target, context: Context
) -> list[_Size]:
    held, sizes = held_masks(program, layers), []
    for candidate in layers:
        total = _weight_of(program, candidate, target.figure, context)
        # Grouped convolutions are pruned by element, if at all.
        granularity = "element" if candidate.grouped else target.granularity
        units = units_of(candidate, granularity, target.block)
        each = total / max(1, candidate.weight.numel())
        elements = _elements(units, held.get(candidate.name), target) if units.rows else None
        sizes.append(_Size(units, count_left(candidate, held), each, elements))
    return sizes


def _elements(units: Units, held: Tensor | None, target: Target) -> Tensor:
    """Number of elements in so many units: in those that will be kept, or else at most."""
    if not target.by_magnitude:
        return units.elements_of_most(None, held)
    scores = units.scores(units.candidate.weight.detach(), held)
    return units.elements_of_most(torch.cat(list(scores.pieces())), held)


def _share(sizes: Sequence[_Size], densities: Mapping[str, float]) -> float:
    """Share of the parameters, or operations, of the layers that is kept."""
    kept = sum(one.kept(densities.get(one.units.candidate.name, 1.0)) for one in sizes)
    total = sum(one.each * one.units.candidate.weight.numel() for one in sizes)
    return kept / max(1.0, total)


def _weight_of(program: Program, candidate: Candidate, figure: Figure, context: Context) -> int:
    if figure == "parameters":
        return candidate.weight.numel()
    nodes = context.analyses.get(cost, program).nodes
    return sum(nodes[operation.node.name].macs for operation in candidate.operations)


def _milliseconds(
    program: Program,
    densities: Mapping[str, float],
    target: Target,
    context: Context,
) -> float:
    """Milliseconds of the program, pruned by magnitude to some densities, at batch 1."""
    if context.measure is None:
        raise SpecError("prune target_ms", "expected something to measure with, got none")
    pruned = pruned_copy(program, densities, target.granularity, target.block)
    return context.measure(pruned, target.device)


def pruned_copy(
    program: Program, densities: Mapping[str, float], granularity: Granularity, block: str
) -> Program:
    """A copy of a program pruned by magnitude, each weight by itself, without retraining.

    Args:
        program: the program; not changed.
        densities: by weight name.
        granularity: what is pruned as one.
        block: shape of a block.
    """
    duplicate = program.copy()
    chosen = [one for one in find_candidates(duplicate) if densities.get(one.name, 1.0) < 1]
    held = held_masks(duplicate, chosen)
    masks: dict[str, Tensor] = {}
    for candidate in chosen:
        units = units_of(candidate, granularity, block)
        density = densities[candidate.name]
        values = {candidate.name: candidate.weight.detach()}
        masks |= masks_of(Pool((units,), density), values, held, density, 1.0)
    for candidate in chosen:
        candidate.weight.detach().masked_fill_(~masks[candidate.name], 0.0)
    return encoded(duplicate, chosen, masks)
