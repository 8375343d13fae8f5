"""Sensitivity curves of weights by the units that they are pruned by."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from shohin.ir.program import Program
from shohin.passes.analyses.curves import Sensitivity
from shohin.passes.analyses.sensitivity import Prunable, curves_file, measure_curves
from shohin.passes.base import Context, Evaluate
from shohin.passes.pruning.pools import Pool, masks_of
from shohin.passes.pruning.ranking import held_masks
from shohin.passes.pruning.units import Units


def measure_units(
    program: Program,
    weights: Sequence[Units],
    densities: Sequence[float],
    evaluate: Evaluate,
    context: Context,
) -> Sensitivity:
    """Prune each weight alone, by magnitude and without retraining, and measure the network.

    Args:
        program: the program; its weights are what they were afterwards.
        weights: the units of each weight, which are kept or dropped as one.
        densities: shares of a weight's units to keep, ascending.
        evaluate: measures a module, higher is better.
        context: gives the work directory and the progress callback.

    Raises:
        SpecError: when a measure is no finite number, naming weight and density.
    """
    held = held_masks(program, [units.candidate for units in weights])
    prunables = [
        Prunable(one.name, one.node, one.weight, partial(_mask, units, held.get(one.name)))
        for units in weights
        for one in [units.candidate]
    ]
    points = curves_file(program, context.workdir, _ending(weights))
    return measure_curves(
        program.module,
        prunables,
        evaluate,
        densities,
        points,
        resume=context.resume,
        progress=context.progress,
    )


def _mask(units: Units, held: Tensor | None, density: float) -> Tensor:
    name, weight = units.candidate.name, units.candidate.weight.detach()
    left = {} if held is None else {name: held}
    return masks_of(Pool((units,), density), {name: weight}, left, density, 1.0)[name]


def _ending(weights: Sequence[Units]) -> str:
    """Tells the points of other units than elements apart."""
    if not any(units.rows for units in weights):
        return ""
    shapes = sorted((units.candidate.name, units.rows, units.columns) for units in weights)
    return f"-{hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:8]}"
