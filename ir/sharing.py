"""Weights that share few values, while a module trains: one gradient for each centroid."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shohin.errors import SpecError
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.masking import parametrised
from shohin.ir.program import tensor_of
from shohin.ir.ternarising import Ternarised


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

    def codebook(self, original: Tensor) -> tuple[Tensor, Tensor]:
        """The centroids as they are now, and the uint8 index of every kept element."""
        return original.detach().cpu().clone(), self.indices.to("cpu", torch.uint8)


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


class Reassigned(nn.Module):
    """Parametrisation that makes every element of a weight the centroid nearest to it.

    The optimiser sees the weight itself, whose gradient is that of what stands for it (straight
    through: Cardinaux et al., arXiv 1811.05355). While the module trains, centroids first move to
    the mean of their elements, a step of k-means, each time that the weight is asked for; so they
    move by the mean of their elements' steps, as those of `Shared` do, and an element that goes
    its own way for long enough changes its centroid.

    Args:
        centroids: the values to start from, ascending.
        mask: true where an element is kept; None for all of them. The others are zero.
    """

    centroids: Tensor
    places: Tensor | None

    def __init__(self, centroids: Tensor, mask: Tensor | None) -> None:
        super().__init__()
        places = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        for name, tensor in (("centroids", centroids.detach().clone()), ("places", places)):
            self.register_buffer(name, tensor, persistent=False)
        self.settled = False
        self.finished = False

    def forward(self, weight: Tensor) -> Tensor:
        """The dense weight."""
        if self.finished:
            return weight
        if self.training and not self.settled:
            self._move(weight)
        found: Tensor = _Nearest.apply(weight, self)  # type: ignore[no-untyped-call]
        return found

    def codebook(self, original: Tensor) -> tuple[Tensor, Tensor]:
        """The centroids that have elements, and the uint8 index of every kept element.

        Centroids are at the means of their elements then, and stay there.
        """
        if not self.settled:
            self._move(original)
            self.centroids = self.centroids[torch.unique(self.nearest(original))]
            self.settled = True
        indices = self.nearest(original)
        return self.centroids.cpu().clone(), indices.to("cpu", torch.uint8)

    def kept(self, weight: Tensor) -> Tensor:
        """The elements that are not held at zero."""
        flat = weight.detach().reshape(-1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def nearest(self, weight: Tensor) -> Tensor:
        """Which centroid each kept element is nearest to, of two equally near ones the lower."""
        exact = self.centroids.double()
        middles = (exact[1:] + exact[:-1]) / 2
        return torch.bucketize(self.kept(weight).double(), middles)

    def _move(self, weight: Tensor) -> None:
        """Put each centroid at the mean of its elements; one without elements stays."""
        indices, count = self.nearest(weight), self.centroids.numel()
        counts = torch.bincount(indices, minlength=count)
        sums = torch.zeros(count, dtype=torch.float64, device=indices.device)
        sums.index_add_(0, indices, self.kept(weight).double())
        means = (sums / counts.clamp_min(1)).to(self.centroids.dtype)
        # Means of half-precision numbers can round to the same number.
        self.centroids = torch.where(counts > 0, means, self.centroids).sort().values


class _Nearest(torch.autograd.Function):
    """The nearest centroids, with the gradient of the identity where elements are kept."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, holder: Reassigned) -> Tensor:
        ctx.holder = holder
        values = holder.centroids.index_select(0, holder.nearest(weight))
        if holder.places is None:
            return values.reshape(weight.shape)
        dense = values.new_zeros(weight.numel()).index_copy_(0, holder.places, values)
        return dense.reshape(weight.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        holder, (gradient,) = ctx.holder, gradients
        if holder.places is None:
            return gradient, None
        flat = torch.zeros_like(gradient).reshape(-1)
        kept = gradient.reshape(-1).index_select(0, holder.places)
        return flat.index_copy_(0, holder.places, kept).reshape(gradient.shape), None


Holder: TypeAlias = Shared | Reassigned
"""What makes a weight of few values while it trains."""


def trained_codebook(module: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """What stands for a weight inside of `shared`, as it is now, on the CPU.

    Returns:
        The centroids, and uint8 ``[n]``, the index of every kept element.
    """
    path, _, leaf = name.rpartition(".")
    found: Any = module.get_submodule(path)
    stand_ins = found.parametrizations[leaf]
    holder: Holder = stand_ins[0]
    return holder.codebook(stand_ins.original)


def axes_of(module: nn.Module) -> dict[Tensor, int]:
    """Numbers of axes of the weights that parameters stand for.

    Centroids are a vector; penalties on weights, and none on biases, have to see the weight. So
    are the scales of a ternary weight, which the authors' script penalises as it does weights.
    """
    found: dict[Tensor, int] = {one: one.dim() for one in module.parameters()}
    for part in module.modules():
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], Shared):
            found[part.original] = len(part[0].shape)
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], Ternarised):
            found[part[0].scales] = part.original.dim()
    return found


def codebook_of(encoding: Encoding) -> Codebook | None:
    """The codebook of a weight, or that of its kept elements; None where there is none."""
    inner = encoding.values if isinstance(encoding, Sparse) else encoding
    return inner if isinstance(inner, Codebook) else None


@contextmanager
def shared(
    module: nn.Module, encodings: Mapping[str, Encoding], *, moving: bool = False
) -> Iterator[dict[str, Holder]]:
    """Let weights train in such a way that they go on sharing few values, by parametrisations.

    Inside, `trained_codebook` gives the centroids and who shares them. Afterwards, after an error
    too, the parametrisations are gone, and the parameters are the same objects as before and hold
    the dense weights.

    Args:
        module: a captured module; its weights are changed in place.
        encodings: by weight name, each with a codebook: of all its elements, or of the kept ones.
        moving: whether elements may move from one centroid to another, see `Reassigned`; else
            only the centroids train, see `Shared`.

    Yields:
        What makes each weight, by its name.

    Raises:
        SpecError: when an encoding has no codebook.
    """
    holders: dict[int, Holder] = {}
    by_name: dict[str, Holder] = {}
    with ExitStack() as stack:
        for name, encoding in encodings.items():
            weight = tensor_of(module, name)
            holder = holders.setdefault(id(weight), _holder(name, encoding, moving))
            stack.enter_context(_dense_again(module, name, holder))
            by_name[name] = holder
        yield by_name


def _holder(name: str, encoding: Encoding, moving: bool) -> Holder:
    book = codebook_of(encoding)
    if book is None:
        found = encoding.describe()
        raise SpecError(f"shared weight '{name}'", f"expected a codebook, got {found}")
    mask = encoding.mask if isinstance(encoding, Sparse) else None
    if moving:
        return Reassigned(book.centroids, mask)
    return Shared(book.indices, book.centroids, encoding.shape, mask)


@contextmanager
def _dense_again(module: nn.Module, name: str, holder: Holder) -> Iterator[None]:
    try:
        with parametrised(module, name, holder):
            yield
    finally:
        holder.finished = True
