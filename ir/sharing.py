"""Weights that share few values, while a module trains: one gradient for each centroid."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import SpecError
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.masking import parametrised
from shohin.ir.program import tensor_of


class Shared(nn.Module):
    """Parametrisation that makes a weight of its centroids; assignments are fixed.

    The gradient of a centroid is the sum of those of its elements (Deep Compression, section 3.3).
    What the optimiser sees is the centroid times about the square root of their number `n`: a step
    of gradient descent then moves a centroid by the mean of what it would have moved its elements,
    the nearest that they can come to it together, and a learning rate that suits weights suits
    centroids, however large the layer is. The factor is a power of two, so that nothing is rounded.

    Args:
        indices: uint8 ``[n]``, which centroid each kept element is.
        centroids: the values to start from.
        shape: of the weight.
        mask: true where an element is kept, in whose order `indices` are; None for all of them.
    """

    def __init__(
        self, indices: Tensor, centroids: Tensor, shape: tuple[int, ...], mask: Tensor | None
    ) -> None:
        super().__init__()
        self.indices = indices.reshape(-1).int()
        counts = torch.bincount(self.indices, minlength=centroids.numel()).clamp_min(1)
        self.scale = torch.exp2((counts.double().log2() / 2).round()).to(centroids.dtype)
        self.start = centroids.detach() * self.scale
        self.parameter = self.start
        self.shape = shape
        self.mask = mask
        self.finished = False

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The scaled centroids, which the optimiser sees in place of the weight."""
        return self.start

    @property
    def centroids(self) -> Tensor:
        """The centroids as they are now."""
        return self.parameter.detach() / self.scale

    def forward(self, scaled: Tensor) -> Tensor:
        """The dense weight."""
        if self.finished:
            # Under another name, the tied weight was brought back to its dense form already.
            return scaled
        found: Tensor = _Lookup.apply(scaled / self.scale, self)  # type: ignore[no-untyped-call]
        return found


class _Lookup(torch.autograd.Function):
    """Centroids at their places. PyTorch's own indexing sums gradients far more slowly."""

    @staticmethod
    def forward(ctx: Any, centroids: Tensor, holder: Shared) -> Tensor:
        ctx.holder, ctx.count = holder, centroids.numel()
        values = centroids.index_select(0, holder.indices)
        if holder.mask is None:
            return values.reshape(holder.shape)
        return values.new_zeros(holder.shape).masked_scatter_(holder.mask, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        holder, (gradient,) = ctx.holder, gradients
        kept = gradient.reshape(-1) if holder.mask is None else gradient[holder.mask]
        # In double precision: a cluster can have millions of elements.
        sums = torch.bincount(holder.indices, kept.double(), ctx.count)
        return sums.to(gradient.dtype), None


def codebook_of(encoding: Encoding) -> Codebook | None:
    """The codebook of a weight, or that of its kept elements; None where there is none."""
    inner = encoding.values if isinstance(encoding, Sparse) else encoding
    return inner if isinstance(inner, Codebook) else None


@contextmanager
def shared(module: nn.Module, encodings: Mapping[str, Encoding]) -> Iterator[dict[str, Shared]]:
    """Let the centroids of weights stand for the weights, by parametrisations.

    Afterwards, after an error too, the parametrisations are gone, and the parameters are the same
    objects as before and hold the dense weights.

    Args:
        module: a captured module; its weights are changed in place.
        encodings: by weight name, each with a codebook: of all its elements, or of the kept ones.

    Yields:
        What makes each weight, by its name; its centroids change as the module trains.

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
            holder.parameter = weight
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
