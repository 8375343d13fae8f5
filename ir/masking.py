"""Masks that hold weights at zero while a module trains."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shohin.errors import SpecError
from shohin.ir.program import tensor_of


class Masked(nn.Module):
    """Parametrisation that gives a weight with zeros where elements were dropped.

    Whatever an optimiser does to the dropped elements (momentum, weight decay, noise) has no
    effect, and no gradient reaches them.

    Args:
        mask: bool tensor of the weight's shape, true where an element is kept.
    """

    dropped: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        # Not persistent, so that the state dictionary holds weights alone.
        self.register_buffer("dropped", ~mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with exact zeros outside the mask, whatever stood there."""
        return weight.masked_fill(self.dropped, 0.0)


@contextmanager
def masked(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold weights at zero outside of masks, by parametrisations of `torch.nn.utils.parametrize`.

    Afterwards, after an error too, the parametrisations are gone, the parameters are the same
    objects as before, and their elements outside the masks are exactly 0.0. A tensor that has
    several names is one mask's matter: masks of several of its names are all applied.

    Args:
        module: a captured module; its weights are changed in place.
        masks: bool tensors by weight name, of the weights' shapes.

    Raises:
        SpecError: when a mask is not of its weight's shape, or not bool.
    """
    _check_masks(module, masks)
    tied = _by_tensor(module, masks)
    with ExitStack() as stack:
        for names in tied:
            mask = torch.stack([masks[name] for name in names if name in masks]).all(0)
            holder = Masked(mask)
            for name in names:
                stack.enter_context(parametrised(module, name, holder))
        yield


@contextmanager
def parametrised(module: nn.Module, name: str, holder: nn.Module) -> Iterator[None]:
    """Let a parametrisation stand for a weight; afterwards the weight is what it gave."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    parametrize.register_parametrization(owner, leaf, holder, unsafe=True)
    try:
        yield
    finally:
        parametrize.remove_parametrizations(owner, leaf, leave_parametrized=True)


def _check_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        weight = tensor_of(module, name)
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            expected = f"bool{list(weight.shape)}"
            found = f"{str(mask.dtype).removeprefix('torch.')}{list(mask.shape)}"
            raise SpecError(f"mask of '{name}'", f"expected {expected}, got {found}")


def _by_tensor(module: nn.Module, masks: Mapping[str, Tensor]) -> list[list[str]]:
    """All names of each tensor that has a mask, since every name has to see the masked weight."""
    wanted = {id(tensor_of(module, name)) for name in masks}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    found: dict[int, list[str]] = {}
    for name, tensor in named:
        if id(tensor) in wanted:
            found.setdefault(id(tensor), []).append(name)
    return list(found.values())
