"""Batch normalisation in inference mode as what it is: a scale and a shift per channel."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from shohin.passes.patterns import NoMatch, argument, constant_weight
from shohin.passes.remarks import Reason


@dataclass(frozen=True, eq=False)
class Affine:
    """A batch normalisation as ``x * scale + shift`` per channel, in float64.

    Attributes:
        scale: `[channels]`.
        shift: `[channels]`.
    """

    scale: Tensor
    shift: Tensor


def affine_of(node: fx.Node) -> Affine | NoMatch:
    """What a batch normalisation does to each channel, or why that is not fixed.

    With weight gamma and bias beta, ``scale = gamma / sqrt(variance + eps)`` and
    ``shift = beta - mean * scale``.
    """
    if argument(node, "training", False):
        return NoMatch(Reason.TRAINING_MODE, "it normalises by the statistics of its batch")
    mean, variance = (_vector(node, name) for name in ("running_mean", "running_var"))
    if mean is None or variance is None:
        return NoMatch(Reason.NOT_CONSTANT, "its statistics are not weights of the program")
    learned = [_vector(node, name) for name in ("weight", "bias")]
    given = [argument(node, name) is not None for name in ("weight", "bias")]
    if any(wanted and found is None for wanted, found in zip(given, learned, strict=True)):
        return NoMatch(Reason.NOT_CONSTANT, "its scale or shift is not a weight of the program")
    gain = torch.ones_like(variance) if learned[0] is None else learned[0]
    offset = torch.zeros_like(mean) if learned[1] is None else learned[1]
    scale = gain / torch.sqrt(variance + float(argument(node, "eps")))
    shift = offset - mean * scale
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        return NoMatch(Reason.NOT_FINITE, "its scale or shift is NaN or infinite")
    return Affine(scale, shift)


def _vector(node: fx.Node, name: str) -> Tensor | None:
    found = constant_weight(argument(node, name))
    return None if found is None else found.double()
