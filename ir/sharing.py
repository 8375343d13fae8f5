"""Weights that share few values, while a module trains: one gradient for each centroid."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shohin.errors import SpecError
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.masking import parametrised
from shohin.ir.program import tensor_of


class Shared(nn.Module):
    """Parametrisation that makes a weight of its centroids; assignments are fixed.

    The gradient of a centroid is the mean of those of its elements: the sum that Deep Compression
    (section 3.3) takes, divided by their number. A step of gradient descent then moves a centroid
    by the mean of what it would have moved its elements, the nearest that they can come to it
    together; so a learning rate that suits weights suits centroids, however large the layer is.
    What adapts its steps to the size of gradients, as Adam does, takes the same steps either way.

    Args:
        indices: uint8 ``[n]``, which centroid each kept element is.
        centroids: the values to start from.
        shape: of the weight.
        mask: true where an element is kept, in whose order `indices` are; None for all of them.
    """

    indices: Tensor
    counts: Tensor
    places: Tensor | None

    def __init__(
        self, indices: Tensor, centroids: Tensor, shape: tuple[int, ...], mask: Tensor | None
    ) -> None:
        super().__init__()
        flat = indices.reshape(-1).int()
        counts = torch.bincount(flat, minlength=centroids.numel()).clamp_min(1)
        places = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        # Buffers follow the module to its device. Not persistent, so that the state dictionary
        # holds weights alone.
        for name, tensor in (("indices", flat), ("counts", counts), ("places", places)):
            self.register_buffer(name, tensor, persistent=False)
        self.start = centroids.detach()
        self.shape = shape
        self.finished = False

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The centroids, which the optimiser sees in place of the weight."""
        return self.start.clone()

    def forward(self, centroids: Tensor) -> Tensor:
        """The dense weight."""
        if self.finished:
            # Under another name, the tied weight was brought back to its dense form already.
            return centroids
        found: Tensor = _Lookup.apply(centroids, self)  # type: ignore[no-untyped-call]
        return found


class _Lookup(torch.autograd.Function):
    """Centroids at their places. PyTorch's own indexing sums gradients far more slowly."""

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, holder: Shared) -> Tensor:
        ctx.holder = holder
        values = centroids.index_select(0, holder.indices)
        if holder.places is None:
            return values.reshape(holder.shape)
        dense = values.new_zeros(math.prod(holder.shape)).index_copy_(0, holder.places, values)
        return dense.reshape(holder.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        holder, (gradient,) = ctx.holder, gradients
        flat = gradient.reshape(-1)
        kept = flat if holder.places is None else flat.index_select(0, holder.places)
        # In double precision: a cluster can have millions of elements.
        sums = torch.zeros_like(holder.counts, dtype=torch.float64)
        sums.index_add_(0, holder.indices, kept.double())
        return (sums / holder.counts).to(gradient.dtype), None


def centroids_of(module: nn.Module, name: str) -> Tensor:
    """The centroids that stand for a weight inside of `shared`, as they are now, on the CPU."""
    path, _, leaf = name.rpartition(".")
    found: Any = module.get_submodule(path)
    centroids: Tensor = found.parametrizations[leaf].original
    return centroids.detach().cpu().clone()


def axes_of(module: nn.Module) -> dict[Tensor, int]:
    """Numbers of axes of the weights that parameters stand for.

    Centroids are a vector; penalties on weights, and none on biases, have to see the weight.
    """
    found: dict[Tensor, int] = {one: one.dim() for one in module.parameters()}
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], Shared):
            found[part.original] = len(part[0].shape)
    return found


def codebook_of(encoding: Encoding) -> Codebook | None:
    """The codebook of a weight, or that of its kept elements; None where there is none."""
    inner = encoding.values if isinstance(encoding, Sparse) else encoding
    return inner if isinstance(inner, Codebook) else None


@contextmanager
def shared(module: nn.Module, encodings: Mapping[str, Encoding]) -> Iterator[dict[str, Shared]]:
    """Let the centroids of weights stand for the weights, by parametrisations.

    Inside, `centroids_of` gives them. Afterwards, after an error too, the parametrisations are
    gone, and the parameters are the same objects as before and hold the dense weights.

    Args:
        module: a captured module; its weights are changed in place.
        encodings: by weight name, each with a codebook: of all its elements, or of the kept ones.

    Yields:
        What makes each weight, by its name.

    Raises:
        SpecError: when an encoding has no codebook.
    """
    holders: dict[int, Shared] = {}
    by_name: dict[str, Shared] = {}
    with ExitStack() as stack:
        for name, encoding in encodings.items():
            weight = tensor_of(module, name)
            holder = holders.setdefault(id(weight), _holder(name, encoding))
            stack.enter_context(_dense_again(module, name, holder))
            by_name[name] = holder
        yield by_name


def _holder(name: str, encoding: Encoding) -> Shared:
    book = codebook_of(encoding)
    if book is None:
        found = encoding.describe()
        raise SpecError(f"shared weight '{name}'", f"expected a codebook, got {found}")
    mask = encoding.mask if isinstance(encoding, Sparse) else None
    return Shared(book.indices, book.centroids, encoding.shape, mask)


@contextmanager
def _dense_again(module: nn.Module, name: str, holder: Shared) -> Iterator[None]:
    try:
        with parametrised(module, name, holder):
            yield
    finally:
        holder.finished = True
