"""Sensitivity curves of weights by the units that they are pruned by."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from shohin.errors import PassError
from shohin.ir.program import Program
from shohin.ir.serialise import content_hash
from shohin.passes.analyses.curves import LayerCurve, Sensitivity
from shohin.passes.base import Context, Evaluate
from shohin.passes.pruning.figures import read_figures, write_figures
from shohin.passes.pruning.pools import Pool, count_left, masks_of
from shohin.passes.pruning.ranking import held_masks
from shohin.passes.pruning.units import Units

_WHOLE = "the whole network"


def measure_curves(
    program: Program,
    weights: Sequence[Units],
    densities: Sequence[float],
    evaluate: Evaluate,
    context: Context,
) -> Sensitivity:
    """Prune each weight alone, by magnitude and without retraining, and measure the network.

    Afterwards, and also after an error, the weights are what they were. In a folder `workdir`
    every point is kept once it is measured.

    Args:
        program: the program.
        weights: the units of each weight, which are kept or dropped as one.
        densities: shares of a weight's units to keep, ascending.
        evaluate: measures a module, higher is better.
        context: gives the work directory and the progress callback.

    Raises:
        PassError: when a measure is no finite number, naming weight and density.
    """
    points = _Points(_file(program, context), context.resume)
    held = held_masks(program, [units.candidate for units in weights])
    total, done = 1 + len(weights) * len(densities), 0
    context.progress(done, total, _WHOLE)
    baseline = points.get(_WHOLE, _WHOLE, lambda: evaluate(program.module))
    curves = []
    for units in weights:
        candidate, measured = units.candidate, []
        for density in densities:
            done, label = done + 1, f"{candidate.name} at density {density:g}"
            context.progress(done, total, label)
            with _pruned(units, density, held.get(candidate.name)) as changed:
                key = f"{label}, {units.rows}x{units.columns}" if changed else _WHOLE
                found = points.get(key, label, lambda: evaluate(program.module))
                measured.append((density, found))
        curves.append(LayerCurve(candidate.name, candidate.node.name, tuple(measured)))
    context.progress(total, total, "")
    return Sensitivity(tuple(curves), baseline)


@contextmanager
def _pruned(units: Units, density: float, held: Tensor | None) -> Iterator[bool]:
    """A weight is pruned by itself inside the block, which is told whether that changes it."""
    weight, name = units.candidate.weight, units.candidate.name
    saved = weight.detach().clone()
    left = {} if held is None else {name: held}
    mask = masks_of(Pool((units,), density), {name: saved}, left, density, 1.0)[name]
    try:
        with torch.no_grad():
            weight.masked_fill_(~mask, 0.0)
        yield int(mask.sum()) < count_left(units.candidate, left)
    finally:
        with torch.no_grad():
            weight.copy_(saved)


class _Points:
    """What was measured so far, by key, in memory and in a file.

    Args:
        file: the file; None for none.
        resume: whether to begin with what is in it.
    """

    def __init__(self, file: Path | None, resume: bool) -> None:
        self._file = file
        self._known = (read_figures(file) if resume else None) or {}

    def get(self, key: str, label: str, measure: Callable[[], float]) -> float:
        """A point, measured and written where it is not known; the label is for errors."""
        if key not in self._known:
            self._known[key] = _finite(measure(), label)
            write_figures(self._file, self._known)
        return self._known[key]


def _finite(found: object, label: str) -> float:
    problem = f"expected a finite number for {label}, got "
    try:
        figure = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise PassError("evaluate", f"{problem}{type(found).__name__}") from error
    if not math.isfinite(figure):
        hint = "let it give a low number where the outputs of a pruned network are not finite"
        raise PassError("evaluate", f"{problem}{figure}", hint)
    return figure


def _file(program: Program, context: Context) -> Path | None:
    if context.workdir is None:
        return None
    return context.workdir / f"prune-curves-{content_hash(program)[:32]}.json"
