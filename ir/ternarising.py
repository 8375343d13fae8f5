"""Weights that are ternary while a module trains: latent weights, and two learned scales."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from shohin.ir.encodings import Dense
from shohin.ir.masking import parametrised
from shohin.ir.program import tensor_of
from shohin.ir.ternary import Ternary


@dataclass(frozen=True)
class Threshold:
    """Zeros by size: elements up to a share of the largest (arXiv 1612.01064, equation 9).

    Attributes:
        share: of the largest absolute latent weight, from 0 to below 1.
    """

    share: float

    def limit(self, latent: Tensor) -> Tensor:
        """The absolute value up to which elements of a tensor that is not empty are zero."""
        return self.share * latent.abs().amax()

    def __str__(self) -> str:
        """As an option of the pass."""
        return f"threshold={self.share!r}"


@dataclass(frozen=True)
class Sparsity:
    """Zeros by number: always the same share of the elements, the article's second way.

    Attributes:
        share: of the elements, rounded down to whole ones; where several are as large as the
            largest zero, they are zero as well. From 0 to below 1.
    """

    share: float

    def limit(self, latent: Tensor) -> Tensor:
        """The absolute value up to which elements of a tensor that is not empty are zero."""
        count = math.floor(self.share * latent.numel())
        if not count:
            return latent.new_zeros(())
        return latent.detach().abs().flatten().kthvalue(count).values

    def __str__(self) -> str:
        """As an option of the pass."""
        return f"sparsity={self.share!r}"


Zeros: TypeAlias = Threshold | Sparsity


@dataclass(frozen=True)
class Start:
    """How the training of a ternary weight starts.

    Attributes:
        zeros: which elements of the latent weight are zero, in every step.
        unit: what the two scales are multiples of.
        scales: where the two scales start.
    """

    zeros: Zeros
    unit: float
    scales: tuple[float, float] = (1.0, 1.0)


def ternary_codes(latent: Tensor, zeros: Zeros) -> Tensor:
    """Which elements lie above a limit, and which below its negative: int8 1, 0 and -1.

    Args:
        latent: any tensor.
        zeros: what the limit is.
    """
    if not latent.numel():
        return torch.zeros_like(latent, dtype=torch.int8)
    limit = zeros.limit(latent)
    return (latent > limit).to(torch.int8) - (latent < -limit).to(torch.int8)


class Ternarised(nn.Module):
    """Parametrisation that makes a weight of its latent form (arXiv 1612.01064, section 3).

    With a unit u, latent weights w and g the gradient of the weight that is made::

        made  =  u Wp  where w > t max|w|,   -u Wn  where w < -t max|w|,   else 0
        dL/dWp = u sum of g where it is u Wp,   dL/dWn = -u sum of g where it is -u Wn
        dL/dw = g Wp,   g Wn,   g   in the same three places

    These are the published function and gradients of ``w / u``, times u. With a unit of 1 they are
    those of the authors' script. The threshold follows the largest latent weight of every step,
    without a gradient, so the size of latent weights does not matter; a `Sparsity` puts the limit
    where it gives as many zeros in every step.

    Args:
        start: which elements are zero, and the unit.
        like: the weight, whose device and element type the scales get.
    """

    def __init__(self, start: Start, like: Tensor) -> None:
        super().__init__()
        self.start = start
        self.scales = nn.Parameter(like.new_tensor(start.scales))
        self.finished = False

    def extra_repr(self) -> str:
        """What no tensor tells: threshold or sparsity, and unit."""
        return f"{self.start.zeros}, unit={self.start.unit!r}"

    def forward(self, latent: Tensor) -> Tensor:
        """The dense weight."""
        if self.finished:
            # Under another name, the tied weight was brought to its ternary form already.
            return latent
        made: Tensor = _Ternarise.apply(latent, self.scales, self.start)  # type: ignore[no-untyped-call]
        return made

    def values(self) -> Tensor:
        """What stands for 1 and -1, the second without its sign: ``[2]``."""
        return self.scales.detach() * self.start.unit

    def freeze(self, latent: Tensor) -> Ternary:
        """The weight as it is stored, on the CPU."""
        codes = ternary_codes(latent.detach(), self.start.zeros)
        return Ternary(codes.cpu(), Dense(self.values().cpu()))


class _Ternarise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor, scales: Tensor, start: Start) -> Tensor:
        codes = ternary_codes(latent, start.zeros)
        above, below = codes > 0, codes < 0
        ctx.save_for_backward(above, below, scales)
        ctx.unit = start.unit
        positive, negative = scales * start.unit
        zero = latent.new_zeros(())
        return torch.where(above, positive, torch.where(below, -negative, zero))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        above, below, scales = ctx.saved_tensors
        (gradient,) = gradients
        # In double precision: a layer can have millions of elements.
        sums = [(gradient * part).double().sum() for part in (above, below)]
        to_scales = torch.stack([sums[0], -sums[1]]) * ctx.unit
        factors = torch.where(above, scales[0], torch.where(below, scales[1], 1.0))
        return gradient * factors, to_scales.to(scales.dtype), None


@contextmanager
def ternarised(module: nn.Module, starts: Mapping[str, Start]) -> Iterator[dict[str, Ternarised]]:
    """Let weights train as ternary ones, by parametrisations.

    Inside, `frozen` gives what is to be stored. Afterwards, after an error too, the
    parametrisations are gone, and the parameters are the same objects as before and hold the
    ternary weights.

    Args:
        module: a captured module; its weights are changed in place.
        starts: by weight name; tied weights under every one of their names.

    Yields:
        What makes each weight, by its name.
    """
    holders: dict[int, Ternarised] = {}
    by_name: dict[str, Ternarised] = {}
    with ExitStack() as stack:
        for name, start in starts.items():
            weight = tensor_of(module, name)
            holder = holders.setdefault(id(weight), Ternarised(start, weight))
            stack.enter_context(_dense_again(module, name, holder))
            by_name[name] = holder
        yield by_name


def frozen(module: nn.Module, holders: Mapping[str, Ternarised]) -> dict[str, Ternary]:
    """What weights inside of `ternarised` are stored as, by name."""
    return {name: holders[name].freeze(one) for name, one in latent_weights(module, holders)}


def latent_weights(
    module: nn.Module, holders: Mapping[str, Ternarised]
) -> Iterator[tuple[str, Tensor]]:
    """What stands for weights inside of `ternarised`, by name."""
    for name in holders:
        path, _, leaf = name.rpartition(".")
        stand_ins: Any = module.get_submodule(path).parametrizations
        yield name, stand_ins[leaf].original


@contextmanager
def _dense_again(module: nn.Module, name: str, holder: Ternarised) -> Iterator[None]:
    try:
        with parametrised(module, name, holder):
            yield
    finally:
        holder.finished = True
