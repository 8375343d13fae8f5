"""What every artifact checks of the arrays that it is given."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.errors import InputError
from shohin.ir.program import InputSpec

Array: TypeAlias = NDArray[np.generic]


def numpy_dtype(spec: InputSpec) -> "np.dtype[Any]":
    """The element type of an input as numpy knows it."""
    return np.dtype(str(spec.dtype).removeprefix("torch."))


def as_array(item: object, index: int) -> Array:
    """A numpy array or torch tensor as an array; it shares its memory where that is possible.

    Args:
        item: what a caller gave.
        index: its position among the inputs, for errors.

    Raises:
        InputError: when it is neither, or of an element type that numpy has not.
    """
    if isinstance(item, np.ndarray):
        return item
    if not isinstance(item, torch.Tensor):
        problem = f"expected a numpy array or torch tensor, got {type(item).__name__}"
        raise InputError(f"input {index}", problem)
    try:
        array: Array = item.detach().cpu().numpy()
    except TypeError as error:
        problem = f"numpy has no element type {str(item.dtype).removeprefix('torch.')}"
        raise InputError(f"input {index}", problem, "convert it with .float()") from error
    return array


def check_inputs(
    name: str, specs: Sequence[InputSpec], batch: int, inputs: Sequence[Array]
) -> list[Array]:
    """The inputs, contiguous.

    Args:
        name: the model's name, for errors.
        specs: what goes in, at the compiled batch size.
        batch: that size, 0 where the model has no batch axis.
        inputs: what a caller gave.

    Raises:
        InputError: naming the input, what was expected and what was given.
    """
    if len(inputs) != len(specs):
        names = ", ".join(f"{spec.name}: {spec.describe()}" for spec in specs)
        problem = f"expected {count_of(len(specs), 'input')} ({names}), got {len(inputs)}"
        raise InputError(name, problem)
    for spec, array in zip(specs, inputs, strict=True):
        if array.shape != spec.shape or array.dtype != numpy_dtype(spec):
            sizes = ",".join(str(size) for size in array.shape)
            raise InputError(
                f"input '{spec.name}'",
                f"expected {spec.describe()}, got {array.dtype}[{sizes}]",
                _mismatch_hint(spec, batch, array),
            )
    return [np.asarray(array, order="C") for array in inputs]


def count_batches(name: str, batch: int, inputs: Sequence[Array]) -> int:
    """How many runs the inputs are, whose axis 0 must be a multiple of the compiled batch.

    Args:
        name: the model's name, for errors.
        batch: the compiled batch size, 0 where the model has no batch axis.
        inputs: what a caller gave.

    Raises:
        InputError: when the model has no batch axis or the sizes do not divide.
    """
    if not batch:
        problem = "has no batch axis, so its inputs cannot be split in batches"
        raise InputError(name, problem, "give inputs of exactly the compiled shape")
    sizes = {array.shape[0] if array.ndim else 0 for array in inputs}
    if len(sizes) != 1:
        raise InputError(name, f"expected inputs of one batch size, got {sorted(sizes)}")
    size = sizes.pop()
    if size == 0 or size % batch:
        raise InputError(name, f"expected a multiple of the compiled batch {batch}, got {size}")
    return size // batch


def count_of(number: int, noun: str) -> str:
    """``1 input``, ``2 inputs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _mismatch_hint(spec: InputSpec, batch: int, array: Array) -> str:
    if array.dtype != numpy_dtype(spec):
        return f"convert it with .astype('{numpy_dtype(spec)}')"
    if batch and array.ndim and array.shape[1:] == spec.shape[1:]:
        return f"compile with batch={array.shape[0]}, or use run_batches"
    return "reshape it, or compile the model for this shape"
