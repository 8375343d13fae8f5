"""Values of the plan as kernels take them: sizes, numbers, types, steps."""

import math

import numpy as np
import torch

from shohin.backends.tvm.kernels.emit import LANES, blocks
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.lowering.operations import (
    Array,
    Convolution,
    LayerNormalisation,
    Linear,
    Operation,
    Value,
)


def blocked_bytes(value: Value) -> int:
    """Size of an image in blocked layout."""
    batch, channels, height, width = value.shape
    return batch * blocks(channels) * LANES * height * width * value.dtype.itemsize


def padded(numbers: Array, width: int) -> Array:
    """A vector with zeros behind it."""
    result: Array = np.zeros(width, dtype=numbers.dtype)
    result[: numbers.size] = numbers.reshape(-1)
    return result


def numpy_of(tensor: torch.Tensor) -> Array:
    """A tensor's numbers; bool and integer types keep their width."""
    array: Array = tensor.detach().contiguous().numpy()
    return array


def constant_numbers(value: Value) -> Array:
    """The numbers of a constant value."""
    if value.constant is None:
        raise ValueError(f"{value.name} is not a constant")
    return numpy_of(value.constant)


def dtype_text(dtype: torch.dtype) -> str:
    """TVM's name of an element type."""
    return str(dtype).removeprefix("torch.")


def bias_numbers(operation: Convolution | Linear, width: int) -> Array:
    """The bias with zeros behind it; all are zero where there is none."""
    bias = operation.bias
    return padded(numpy_of(bias) if bias is not None else np.zeros(0, np.float32), width)


def geometry_of(operation: Convolution) -> Geometry:
    """Where the windows of a convolution lie."""
    height, width = operation.x.shape[2:]
    rows, columns = operation.weight.shape[2:]
    return Geometry(
        (height, width),
        (int(rows), int(columns)),
        operation.stride,
        operation.padding,
        operation.dilation,
    )


def macs_of(operation: Convolution) -> int:
    """Multiply-accumulates of a convolution."""
    return operation.output.elements * math.prod(operation.weight.shape[1:])


def affine_numbers(operation: LayerNormalisation) -> list[Array]:
    """Weights and biases of a normalisation; none of them where it has neither."""
    weight, bias = operation.weight, operation.bias
    if weight is None and bias is None:
        return []
    ones: Array = np.ones(operation.columns, np.float32)
    return [
        ones if weight is None else numpy_of(weight).reshape(-1),
        np.zeros_like(ones) if bias is None else numpy_of(bias).reshape(-1),
    ]


def kernel_steps(operation: Operation) -> tuple[Step, ...]:
    """The steps of an operation as kernels take them."""
    return tuple(step.step for step in operation.steps)
