"""Shapes, element types, strides and aliasing of every node's tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from shohin.ir.program import Program
from shohin.ir.shapes import fake_values


@dataclass(frozen=True)
class TensorLayout:
    """One tensor as it lies in memory.

    Attributes:
        shape: sizes.
        dtype: element type.
        strides: elements between neighbours along each axis.
        device: where it lies.
        storage: number of the memory block; tensors that alias each other share it.
        storage_bytes: size of that block.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    device: torch.device
    storage: int
    storage_bytes: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """Elements times their width."""
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True)
class Shapes:
    """The tensors of a program's nodes at one batch size.

    Attributes:
        batch: the batch size.
        tensors: by node name, the tensors a node gives; empty for a node that gives none.
    """

    batch: int
    tensors: Mapping[str, tuple[TensorLayout, ...]]

    def of(self, node: fx.Node) -> TensorLayout:
        """The tensor of a node that gives exactly one.

        Raises:
            KeyError: when it gives none or several.
        """
        found = self.tensors.get(node.name, ())
        if len(found) != 1:
            raise KeyError(f"node '{node.name}' gives {len(found)} tensors, not one")
        return found[0]


def shapes(program: Program) -> Shapes:
    """The tensors of every node at batch 1."""
    return shapes_at(program, batch=1)


def shapes_at(program: Program, batch: int) -> Shapes:
    """The tensors of every node at a batch size.

    Raises:
        VerifyError: naming the node whose operator refuses its arguments.
    """
    values = fake_values(program.module, program.inputs, batch)
    numbers: dict[int, int] = {}
    layouts = {
        node.name: tuple(_layout(tensor, numbers) for tensor in _tensors(value))
        for node, value in values.items()
    }
    return Shapes(batch, layouts)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _layout(tensor: Tensor, numbers: dict[int, int]) -> TensorLayout:
    storage = tensor.untyped_storage()
    number = numbers.setdefault(storage._cdata, len(numbers))
    return TensorLayout(
        tuple(tensor.shape),
        tensor.dtype,
        tuple(tensor.stride()),
        tensor.device,
        number,
        storage.nbytes(),
    )
