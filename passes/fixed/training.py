"""Training of a fixed-point network with straight-through estimators.

The optimiser sees free weights. What the network computes with are these weights rounded to their
formats, and gradients pass the rounding as if it were none, but for weights beyond their format's
range. Formats stay as they were chosen.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import DivergedError
from shohin.ir.encodings import Sparse
from shohin.ir.fixed_point import quantize
from shohin.ir.masking import parametrised
from shohin.ir.program import Program, tensor_of, tied_names
from shohin.ir.training import trainable
from shohin.passes.base import Context
from shohin.passes.fixed.forms import Weighted
from shohin.passes.fixed.graph import FixedGraph
from shohin.passes.fixed.rounding import BIAS_BITS, Rounder
from shohin.passes.fixed.stored import encoded, is_trainable
from shohin.passes.patterns import argument, weight_name
from shohin.passes.pruning.candidates import count_non_finite
from shohin.passes.training import check_trained, trainer_of


class Rounded(nn.Module):
    """Parametrisation that rounds a tensor to a format, with the gradient of the identity.

    Args:
        bits: width of the integers.
        fractions: one for all, or one for each row of axis 0.
        symmetric: whether every number has its negative.
        mask: true where elements are kept; the others are zero. None for all.
    """

    fractions: Tensor
    mask: Tensor | None

    def __init__(
        self, bits: int, fractions: Sequence[int], *, symmetric: bool, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        self._bits, self._symmetric = bits, symmetric
        self.register_buffer("fractions", torch.tensor(fractions).double(), persistent=False)
        self.register_buffer("mask", mask, persistent=False)
        self.finished = False

    def extra_repr(self) -> str:
        """What no tensor tells, and trainings are told apart by: width and symmetry."""
        return f"bits={self._bits}, symmetric={self._symmetric}"

    def forward(self, free: Tensor) -> Tensor:
        """The rounded tensor."""
        if self.finished:
            return free
        found: Tensor = _StraightThrough.apply(free, self)  # type: ignore[no-untyped-call]
        return found

    def rounded(self, free: Tensor) -> Tensor:
        """The numbers of the format that are nearest."""
        scale = 2.0 ** self.fractions.reshape(-1, *[1] * (free.dim() - 1))
        whole = quantize(free.double() * scale, self._bits, 0, symmetric=self._symmetric)
        found = (whole / scale).to(free.dtype)
        return found if self.mask is None else found.where(self.mask, 0.0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, free: Tensor, holder: Rounded) -> Tensor:
        found = holder.rounded(free)
        # Where rounding is more than a step of the grid, the number is out of range.
        step = 2.0 ** -holder.fractions.reshape(-1, *[1] * (free.dim() - 1))
        passing = (found - free).abs() <= step
        ctx.passing = passing if holder.mask is None else passing & holder.mask
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient.where(ctx.passing, 0.0), None


def train_rounded(
    graph: FixedGraph, rounder: Rounder, free: Mapping[str, Tensor], context: Context
) -> None:
    """Train a calibrated fixed-point network through the user's `train`, in place.

    Weights that share values, as those of a codebook and ternary ones do, are not trained; a note
    says so.

    Args:
        graph: all formats chosen.
        rounder: how the weights were rounded; its encodings are replaced.
        free: weights and biases before they were rounded, by name.
        context: gives the training function and the seed.

    Raises:
        DivergedError: when the loss or a weight is NaN or infinite.
    """
    program = graph.program
    trained = [name for name in rounder.formats if is_trainable(rounder.encodings[name])]
    frozen = [name for name in rounder.encodings if name not in trained]
    for name in (one for one in rounder.formats if one not in trained):
        held = rounder.encodings[name].describe()
        context.noted("not-trained", f"{name} is {held}: its elements cannot change by themselves")
    with torch.no_grad():
        for name in (*trained, *rounder.biases):
            tensor_of(program.module, name).copy_(free[name])
    holders = {**_weight_holders(rounder, trained), **_bias_holders(graph)}
    with (
        trainable(program.module, frozen=frozen),
        _all_rounded(program, holders),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(context.seed)
        trainer_of(context, "straight-through", 0)(program.module)
        _check_free(program, holders)
    program.module.cpu()
    check_trained(program, "training of fixed-point weights")
    for name in trained:
        _encode_again(program, rounder, name)


def _check_free(program: Program, names: Iterable[str]) -> None:
    """Refuse free weights that are not finite: rounding would make zeros and limits of them."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        stand_ins: Any = program.module.get_submodule(path)
        bad = count_non_finite(stand_ins.parametrizations[leaf].original)
        if bad:
            problem = f"{bad} elements of {name} are NaN or infinite"
            where = "training of fixed-point weights"
            raise DivergedError(where, problem, "try a lower learning rate")


def _weight_holders(rounder: Rounder, names: Sequence[str]) -> dict[str, Rounded]:
    found = {}
    for name in names:
        made, held = rounder.formats[name], rounder.encodings[name]
        mask = held.mask if isinstance(held, Sparse) else None
        found[name] = Rounded(made.bits, made.fractions, symmetric=True, mask=mask)
    return found


def _bias_holders(graph: FixedGraph) -> dict[str, Rounded]:
    found = {}
    for site in graph.sites:
        name = None
        if isinstance(site.form, Weighted):
            name = weight_name(argument(site.node, "bias"))
        if name is not None:
            fraction = argument(site.node, "input_fraction")
            radix = [one + fraction for one in argument(site.node, "weight_fractions")]
            found[name] = Rounded(BIAS_BITS, radix, symmetric=False)
    return found


@contextmanager
def _all_rounded(program: Program, holders: Mapping[str, Rounded]) -> Iterator[None]:
    """Let rounded tensors stand for free ones; afterwards the tensors are the rounded ones."""
    tied = {name: names for names in tied_names(program) for name in names}
    with ExitStack() as stack:
        for name, holder in holders.items():
            for alias in tied.get(name, [name]):
                stack.enter_context(_one_rounded(program, alias, holder))
        yield


@contextmanager
def _one_rounded(program: Program, name: str, holder: Rounded) -> Iterator[None]:
    try:
        with parametrised(program.module, name, holder):
            yield
    finally:
        # Under another name, a tied tensor was brought back to its rounded form already.
        holder.finished = True


def _encode_again(program: Program, rounder: Rounder, name: str) -> None:
    made, held = rounder.formats[name], rounder.encodings[name]
    weight = tensor_of(program.module, name).detach()
    found = encoded(held, weight, made.bits, made.fractions)
    if found is None:
        raise AssertionError("a weight that was encoded can be encoded again")
    rounder.encodings |= {one: found for one, old in rounder.encodings.items() if old is held}
