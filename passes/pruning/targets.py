"""What a network pruned to some densities comes to: parameters, operations, milliseconds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor

from shohin.errors import ArtifactError, SpecError
from shohin.ir.files import atomic_path
from shohin.ir.program import Program
from shohin.ir.serialise import content_hash
from shohin.passes.analyses.cost import cost
from shohin.passes.analyses.sensitivity import measure_sensitivity
from shohin.passes.base import Context
from shohin.passes.pruning.allocation import (
    Densities,
    curves_of,
    least_pruning,
    measured_densities,
)
from shohin.passes.pruning.candidates import Candidate, find_candidates
from shohin.passes.pruning.pools import Pool, count_left, masks_of
from shohin.passes.pruning.ranking import held_masks
from shohin.passes.pruning.result import encoded
from shohin.passes.pruning.units import Granularity, units_of

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
    """

    figure: Figure
    most: float
    device: str
    granularity: Granularity
    block: str

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
        SpecError: when the context lacks what is needed.
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
    names = [candidate.name for candidate in free]
    measured = target.figure == "ms"
    sensitivity = measure_sensitivity(
        program,
        context.evaluate,
        measured_densities(None if measured else target.most),
        names=names,
        workdir=context.workdir,
        resume=context.resume,
        progress=context.progress,
    )
    least = {one.name: 1 / units_of(one, target.granularity, target.block).count for one in free}

    def not_empty(densities: Densities) -> Densities:
        return {name: max(density, least[name]) for name, density in densities.items()}

    def figure(densities: Densities) -> float:
        chosen = {**given, **not_empty(densities)}
        if measured:
            return _milliseconds(program, chosen, target, context)
        return _share(program, layers, chosen, target.figure, context)

    curves = curves_of(sensitivity, names)
    found = least_pruning(curves, figure, target.most, target.label, measured=measured)
    return not_empty(found)


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


def _share(
    program: Program,
    layers: Sequence[Candidate],
    densities: Mapping[str, float],
    figure: Figure,
    context: Context,
) -> float:
    """Share of the parameters, or operations, of the layers that is kept."""
    held = held_masks(program, layers)
    kept = total = 0.0
    for candidate in layers:
        weight = _weight_of(program, candidate, figure, context)
        left = count_left(candidate, held) / max(1, candidate.weight.numel())
        kept += weight * min(left, densities.get(candidate.name, 1.0))
        total += weight
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
