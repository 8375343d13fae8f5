"""Channels of convolutions and linear maps, multiplied by numbers."""

import math

from torch import Tensor

from shohin.passes.analyses.operators import WeightedOperation


def per_group(operation: WeightedOperation, weight: Tensor) -> Tensor:
    """The weight as `[groups, rows, columns, taps]`, rows and columns those of one group."""
    rows = weight.shape[0] // operation.groups
    return weight.reshape(operation.groups, rows, weight.shape[1], math.prod(weight.shape[2:]))


def scale_channels(
    operation: WeightedOperation, weight: Tensor, scale: Tensor, *, outputs: bool
) -> Tensor:
    """The weight with every output (or input) channel multiplied by its scale."""
    grouped = per_group(operation, weight)
    factors = _spread(operation, scale, outputs)
    return (grouped * factors).reshape(weight.shape)


def largest_of_channels(operation: WeightedOperation, weight: Tensor, *, outputs: bool) -> Tensor:
    """The largest absolute weight of every output (or input) channel."""
    grouped = per_group(operation, weight).abs().amax(3)
    return grouped.amax(2 if _by_row(operation, outputs) else 1).flatten()


def _spread(operation: WeightedOperation, scale: Tensor, outputs: bool) -> Tensor:
    factors = scale.reshape(operation.groups, -1)
    by_row = _by_row(operation, outputs)
    return factors[:, :, None, None] if by_row else factors[:, None, :, None]


def _by_row(operation: WeightedOperation, outputs: bool) -> bool:
    """Whether channels are rows: output channels are, unless the convolution is transposed."""
    return outputs != operation.transposed
