"""Calibration batches: what users give, brought to tuples of tensors and checked."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shohin.backends.inputs import count_of
from shohin.errors import InputError
from shohin.ir.program import InputSpec
from shohin.passes.base import Batch


class Batches(Iterable[Batch]):
    """Batches of input tensors that can be read any number of times.

    Args:
        source: an iterable of tuples of tensors, one for each input of the model; a lone tensor
            stands for a tuple of one. What can be read only once is kept in memory.
        inputs: what the model takes.
    """

    def __init__(self, source: Iterable[object], inputs: Sequence[InputSpec]) -> None:
        if not isinstance(source, Iterable):
            problem = f"expected an iterable of batches, got {type(source).__name__}"
            raise InputError("calibration", problem)
        self._source = list(source) if isinstance(source, Iterator) else source
        self._inputs = tuple(inputs)

    def __iter__(self) -> Iterator[Batch]:
        for index, item in enumerate(self._source):
            yield checked_batch(item, self._inputs, f"calibration batch {index}")

    def first(self) -> Batch | None:
        """The first batch, or None when there is none."""
        return next(iter(self), None)


def noise(inputs: Sequence[InputSpec], batch: int = 1) -> Batch:
    """Inputs that fit a program: standard normal numbers of seed 0, zeros where not float."""
    generator = torch.Generator().manual_seed(0)
    return tuple(noise_of(spec.concrete(batch), spec.dtype, generator) for spec in inputs)


def noise_of(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A tensor of standard normal numbers; of zeros where its type is not float."""
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def checked_batch(item: object, inputs: Sequence[InputSpec], where: str) -> Batch:
    """One batch as a tuple of tensors that fit a model.

    Args:
        item: a tensor, or a tuple or list of tensors.
        inputs: what the model takes.
        where: which batch it is, for errors.

    Raises:
        InputError: when it is anything else, or a tensor has another shape or element type.
    """
    batch = (item,) if isinstance(item, Tensor) else item
    if not isinstance(batch, (tuple, list)):
        problem = f"expected a tuple of tensors, got {type(item).__name__}"
        raise InputError(where, problem)
    if len(batch) != len(inputs):
        taken = ", ".join(f"{spec.name}: {spec.describe()}" for spec in inputs)
        hint = "give the inputs alone, without labels" if len(batch) > len(inputs) else None
        problem = f"expected {count_of(len(inputs), 'tensor')} ({taken}), got {len(batch)}"
        raise InputError(where, problem, hint)
    return tuple(_checked(tensor, spec, where) for tensor, spec in zip(batch, inputs, strict=True))


def _checked(tensor: object, spec: InputSpec, where: str) -> Tensor:
    place = f"{where}, input '{spec.name}'"
    if not isinstance(tensor, Tensor):
        raise InputError(place, f"expected a tensor, got {type(tensor).__name__}")
    sizes = zip(tensor.shape, spec.shape, strict=False)
    fits = all(isinstance(wanted, str) or found == wanted for found, wanted in sizes)
    if tensor.dtype != spec.dtype or tensor.dim() != len(spec.shape) or not fits:
        found = InputSpec(spec.name, tuple(tensor.shape), tensor.dtype).describe()
        raise InputError(place, f"expected {spec.describe()}, got {found}")
    return tensor
