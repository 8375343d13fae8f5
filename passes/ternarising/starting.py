"""Latent weights to start a training from, fitted to what layers respond on calibration data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.ir.program import Program
from shohin.ir.ternarising import Start, Threshold
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.reconstruction import find_layers, unsupported
from shohin.passes.pruning.surgeon import Problem
from shohin.passes.sharing.compensation import with_bias, without_bias
from shohin.passes.ternarising.fitting import assign, best_threshold, fit_scales
from shohin.passes.ternarising.surgery import surgeon_of

_FAR = 8.0
"""Largest latent weights, over the threshold; what is further out would never come back."""

_MARGIN = 0.02
"""How far a latent weight is kept from the threshold, over it, so that rounding does not cross."""


@dataclass(frozen=True, eq=False)
class FittedStart:
    """Where the training of a weight starts.

    Attributes:
        start: threshold, unit and scales.
        latent: the latent weight, of the weight's shape and element type.
    """

    start: Start
    latent: Tensor


def fitted_starts(
    program: Program, candidates: Sequence[Candidate], context: Context
) -> Iterator[tuple[Candidate, FittedStart]]:
    """Starts whose ternary weights respond nearest to what the weights did, layer by layer.

    Codes and scales are those that ``ternary-fit{scales=layer}`` finds. Latent weights are what
    the elements were when they were rounded, each making up for the rounding of those before it.

    Args:
        program: is left as it is.
        candidates: weights that can become ternary.
        context: gives the calibration batches.

    Yields:
        Weights with their starts, in data-flow order; those for which there is no fit are left out,
        with a note.
    """
    network = program.copy()
    by_name = {one.name: one for one in candidates if _can_fit(program, one, context)}
    surgeon = surgeon_of(network, context)
    for done, layer in enumerate(find_layers(network, list(by_name))):
        context.progress(done, len(by_name), f"start of {layer.name}")
        problem = surgeon.problem(layer)
        weights = without_bias(problem)
        found, rows = _fit(weights, layer.weight)
        if found is not None:
            surgeon.write(layer, with_bias(problem, rows))
            yield by_name[layer.name], found


def _can_fit(program: Program, candidate: Candidate, context: Context) -> bool:
    found = unsupported(program, candidate)
    if found is not None:
        context.noted("start", f"{found[1]}; it starts at the means")
    return found is None


def _fit(problem: Problem, weight: Tensor) -> tuple[FittedStart | None, Tensor]:
    """Where a weight starts, and its rows then; None where everything would be zero."""
    pairs = best_threshold(problem, "layer").pairs
    found = assign(problem, pairs)
    fit = fit_scales(problem, found.codes, "layer")
    above, below = fit.pairs[0].tolist()
    limit, unit = float(pairs[0].sum()) / 4, (above + below) / 2
    if not limit or not unit:
        return None, problem.start
    latent = _latent(found.codes, found.values, limit)
    threshold = Threshold(limit / float(latent.abs().max()))
    start = Start(threshold, unit, (above / unit, below / unit))
    codes = found.codes.double()
    rows = codes.clamp_min(0) * above + codes.clamp_max(0) * below
    return FittedStart(start, latent.reshape(weight.shape).to(weight.dtype)), rows


def _latent(codes: Tensor, values: Tensor, limit: float) -> Tensor:
    """Values on that side of the threshold that their codes are on."""
    inner, outer = (1 - _MARGIN) * limit, (1 + _MARGIN) * limit
    far = values.clamp(-_FAR * limit, _FAR * limit)
    below = torch.where(codes < 0, far.clamp_max(-outer), far.clamp(-inner, inner))
    return torch.where(codes > 0, far.clamp_min(outer), below)
