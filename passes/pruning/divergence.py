"""How far pruning one layer moves a network's outputs, as a function of how much is pruned."""

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-30


def divergence(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float:
    """How far outputs are from a reference.

    The squared distance relative to the reference's variance, and the mean Kullback-Leibler
    divergence of the softmax over axis 1 where there is one, as of a classifier's logits. Of
    several outputs all of it adds up; those that are not floating-point are passed over.
    """
    pairs = zip(reference, outputs, strict=True)
    parts = [(one.double(), two.double()) for one, two in pairs if one.is_floating_point()]
    return sum(_distance(one, two) + _kullback_leibler(one, two) for one, two in parts)


def _distance(one: Tensor, two: Tensor) -> float:
    variance = (one - one.mean()).square().sum().clamp_min(_TINY)
    return float((one - two).square().sum() / variance)


def _kullback_leibler(one: Tensor, two: Tensor) -> float:
    if one.dim() < 2:
        return 0.0
    first, second = one.log_softmax(1), two.log_softmax(1)
    return float((first.exp() * (first - second)).sum(1).mean().clamp_min(0.0))


def costs_of(errors: Tensor, measured: Sequence[tuple[int, float]]) -> Tensor:
    """What each element that a layer drops costs the network.

    The divergence of the outputs is measured at a few numbers of dropped elements. In between it is
    a power of the layer's own error, which is known for every number.

    Args:
        errors: the layer's error after each element dropped, `[elements]`, not falling.
        measured: numbers of dropped elements, 1 or more and rising, and divergences of the outputs.

    Returns:
        float64 `[elements]`, not falling: the rise of the divergence with each element dropped, or
        the greatest rise so far.
    """
    logs = errors.clamp_min(_TINY).log()
    counts = torch.tensor([count for count, _ in measured])
    knots = logs[counts - 1]
    values = torch.tensor([found for _, found in measured], dtype=logs.dtype).clamp_min(_TINY).log()
    slopes = torch.diff(values) / torch.diff(knots).clamp_min(1e-3)
    # Noise must not make more pruning look better. Below the first measurement the network is
    # taken to be linear in the layer's responses.
    slopes = torch.cat([torch.ones(1), slopes.clamp(0.0, 4.0)]).to(logs)
    part = torch.bucketize(logs, knots)
    near, slope = (part - 1).clamp_min(0), slopes[part.clamp_max(len(slopes) - 1)]
    distances = (values[near] + slope * (logs - knots[near])).exp()
    rises = torch.diff(distances, prepend=torch.zeros(1).to(distances))
    return rises.cummax(0).values
