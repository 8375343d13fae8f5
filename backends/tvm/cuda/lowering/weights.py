"""Weights of layers as their kernels take them: what tiles are made of, lists, biases."""

from typing import Literal

import numpy as np
import torch

from shohin.backends.tvm.cuda.kernels.tiles import UnitName
from shohin.backends.tvm.cuda.kernels.weights import Weights
from shohin.backends.tvm.cuda.lowering.planner import CudaPlanner
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    Convolution,
    FixedConvolution,
    Linear,
)
from shohin.backends.tvm.lowering.values import numpy_of

_FEW_PER_GROUP = 8
"""Filters of a group up to which tiles of products would be mostly empty."""


def has_small_groups(op: Convolution | FixedConvolution) -> bool:
    """Whether a convolution has groups of so few filters that each output is computed alone."""
    return op.groups > 1 and op.output.shape[1] // op.groups <= _FEW_PER_GROUP


def float_unit(planner: CudaPlanner) -> UnitName:
    """What multiplies floats."""
    return "mma-float" if planner.target.has_fast_tf32 else "fma"


def float_form(op: Convolution | Linear) -> Literal["float", "ternary-float"]:
    """How tiles of products take the weights of a layer."""
    return "float" if op.ternary is None else "ternary-float"


def weight_places(
    planner: CudaPlanner, op: Convolution | Linear, weights: Weights
) -> list[Placement]:
    """Weights, what they stand for if they are codes, and biases."""
    ternary, outputs = op.ternary, len(op.weight)
    if ternary is None:
        places = [planner.constant(lambda: weights.pack(numpy_of(op.weight)))]
    else:
        places = [
            planner.constant(lambda: weights.pack(numpy_of(ternary.codes))),
            planner.constant(lambda: weights.pack_values(numpy_of(ternary.values))),
        ]
    return [*places, planner.constant(lambda: biases_of(op.bias, outputs))]


def biases_of(bias: torch.Tensor | None, count: int) -> Array:
    """Biases, zeros where there are none."""
    return np.zeros(count, np.float32) if bias is None else numpy_of(bias).reshape(-1)


def lists_of(weight: Array) -> tuple[Array, Array, Array]:
    """Weights that are not zero, in lists by output: compressed sparse rows.

    Args:
        weight: ``[outputs, depth]``.

    Returns:
        Where the list of each output begins, int32 ``[outputs + 1]``; columns, int64; weights.
    """
    rows, columns = np.nonzero(weight)
    start = np.zeros(len(weight) + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=len(weight)), out=start[1:])
    return start, columns, weight[rows, columns]


def at_least_one(numbers: Array) -> Array:
    """The numbers, or a zero where there are none."""
    return numbers if numbers.size else np.zeros(1, numbers.dtype)
