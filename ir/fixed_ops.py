"""Operators of fixed-point networks, with exact reference kernels: the namespace ``shohin``.

Tensors hold the numbers themselves, in single precision, which lie on the grid of some format: so
operators that only pass numbers on (ReLU, maximum pooling, reshapes, concatenation, padding with
zeros) are the ordinary ones, and any FX tool can read the graph. Every operator here computes what
it says exactly, as integers do, and rounds once, at the end, to the format that it is told:
``integer = saturate(round(exact result * 2**fraction))``. How wide sums have to be on the way is
the business of the backend, which proves it from the weights.

Gradients are those of the same operators on real numbers, zero where the result is saturated
(straight-through estimators), so that a fixed-point graph trains like any other.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shohin.ir.fixed_point import check_rounding, limits, quantize

_LIBRARY: Any = torch.library.Library("shohin", "DEF")  # type: ignore[no-untyped-call]
_FORMAT = "int bits, int fraction, str rounding='nearest-even'"
_EXACTLY: dict[str, Callable[..., Tensor]] = {}
_EXACT = 1 << 24
"""Integers below this, and sums of them, are exact in single precision."""


def _define(
    name: str, arguments: str, exact: Callable[..., Tensor], real: Callable[..., Tensor] | None
) -> Any:
    """Register an operator that rounds what `exact` gives.

    Args:
        name: of the operator.
        arguments: its schema up to the format of the result.
        exact: the result before it is rounded.
        real: the same on real numbers, for gradients; `exact` itself where there is none.
    """
    _LIBRARY.define(f"{name}({arguments}, {_FORMAT}) -> Tensor")

    _EXACTLY[name] = exact

    def compute(*given: Any) -> Tensor:
        *operands, bits, fraction, rounding = given
        with torch.autocast(operands[0].device.type, enabled=False):
            found = quantize(exact(*operands), bits, fraction, check_rounding(rounding))
        return found.to(torch.float32)

    def shape_only(*given: Any) -> Tensor:
        return (real or exact)(*given[:-3])

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.inputs, ctx.result = inputs, output

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *operands, bits, fraction, _ = ctx.inputs
        passed = gradient * _inside(ctx.result, bits, fraction)
        found = _gradients(real or exact, operands, passed)
        return (*found, None, None, None)

    qualified = f"shohin::{name}"
    _LIBRARY.impl(name, _with_defaults(qualified, compute), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, _with_defaults(qualified, shape_only), lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_LIBRARY)
    return getattr(torch.ops.shohin, name).default


def unrounded(target: Any, operands: Sequence[Any]) -> Tensor:
    """What an operator of `FIXED_OPERATORS` would round: its exact result.

    Args:
        target: the operator.
        operands: its positional arguments, without the format.
    """
    _, _, name = target._schema.name.partition("::")
    return _EXACTLY[name](*operands)


def _with_defaults(qualified: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with all arguments of the operator in order, defaults filled in."""

    def call(*given: Any, **named: Any) -> Tensor:
        namespace, _, name = qualified.partition("::")
        schema = getattr(getattr(torch.ops, namespace), name).default._schema
        declared = schema.arguments[len(given) :]
        return function(*given, *(named.get(one.name, one.default_value) for one in declared))

    return call


def _inside(result: Tensor, bits: int, fraction: int) -> Tensor:
    """Where a result is not at a limit of its format."""
    low, high = (limit * 2.0**-fraction for limit in limits(bits))
    return (result > low) & (result < high)


def _gradients(
    function: Callable[..., Tensor], operands: Sequence[Any], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of a function of real numbers, None for what is no tensor."""
    with torch.enable_grad():
        copies = [
            one.detach().requires_grad_() if isinstance(one, Tensor) else one for one in operands
        ]
        tensors = [one for one in copies if isinstance(one, Tensor)]
        found = torch.autograd.grad(function(*copies), tensors, gradient, allow_unused=True)
    remaining = iter(found)
    return [next(remaining) if isinstance(one, Tensor) else None for one in copies]


def _type_for(weight: Tensor, data: Tensor, unit: float, bias: Tensor | None) -> torch.dtype:
    """Single precision where all sums of products of integers are exact in it, else double.

    Args:
        weight: `[outputs, ...]`.
        data: what it is multiplied with.
        unit: what sums are whole multiples of.
        bias: added to the sums.
    """
    if data.device.type != "cpu" or not data.numel() or not weight.numel():
        return torch.float64
    largest = weight.abs().flatten(1).sum(1) * float(data.abs().max())
    if bias is not None:
        largest = largest + bias.abs()
    return torch.float32 if float(largest.max()) < _EXACT * unit else torch.float64


def _unit(weight_fractions: Sequence[int], input_fraction: int) -> float:
    return float(2.0 ** -(max(weight_fractions) + input_fraction))


def _padded(data: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return functional.pad(data, [left, right, top, bottom]) if any(padding) else data


def _convolve(
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_fractions: Sequence[int],
    input_fraction: int,
) -> Tensor:
    options = ([*stride], [0, 0], [*dilation], groups)
    # NNPACK's transformed convolutions are not exact on integers.
    with torch.backends.nnpack.flags(enabled=False):
        return functional.conv2d(_padded(data, padding), weight, bias, *options)


def _exact_convolve(data: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    kind = _type_for(weight, data, _unit(options[-2], options[-1]), bias)
    added = None if bias is None else bias.to(kind)
    return _convolve(data.to(kind), weight.to(kind), added, *options)


def _multiply(
    data: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_fractions: Sequence[int],
    input_fraction: int,
) -> Tensor:
    return functional.linear(data, weight, bias)


def _exact_multiply(data: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    kind = _type_for(weight, data, _unit(options[-2], options[-1]), bias)
    added = None if bias is None else bias.to(kind)
    return _multiply(data.to(kind), weight.to(kind), added, *options)


def _average(
    data: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    multiplier: int,
    shift: int,
) -> Tensor:
    sums = functional.avg_pool2d(_padded(data, padding), [*kernel], [*stride], divisor_override=1)
    return sums * (multiplier * 2.0**-shift)


fixed_quantize = _define(
    "fixed_quantize", "Tensor input", lambda data: data.double(), lambda data: data.clone()
)
"""Numbers rounded to a format: from real numbers, or from another format."""

fixed_conv2d = _define(
    "fixed_conv2d",
    "Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, int[2] dilation, "
    "int groups, int[] weight_fractions, int input_fraction",
    _exact_convolve,
    _convolve,
)
"""2-d convolution; padding (top, bottom, left, right) with zeros.

Weights are ``[outputs, inputs / groups, rows, columns]`` on the grid of ``weight_fractions`` (one,
or one for each output), biases on that of the products.
"""

fixed_linear = _define(
    "fixed_linear",
    "Tensor input, Tensor weight, Tensor? bias, int[] weight_fractions, int input_fraction",
    _exact_multiply,
    _multiply,
)
"""Fully connected layer on the last axis, weights ``[outputs, inputs]``."""

fixed_add = _define(
    "fixed_add",
    "Tensor input, Tensor other",
    lambda one, two: one.double() + two.double(),
    lambda one, two: one + two,
)
"""Sum of numbers of two formats, aligned at the finer one."""

fixed_multiply = _define(
    "fixed_multiply",
    "Tensor input, Tensor other",
    lambda one, two: one.double() * two.double(),
    lambda one, two: one * two,
)
"""Product of numbers of two formats."""

fixed_average_pool2d = _define(
    "fixed_average_pool2d",
    "Tensor input, int[2] kernel, int[2] stride, int[4] padding, int multiplier, int shift",
    lambda data, *options: _average(data.double(), *options),
    _average,
)
"""Sums over windows times ``multiplier * 2**-shift``, which stands for the windows' area."""

FIXED_OPERATORS = frozenset(
    {
        fixed_quantize,
        fixed_conv2d,
        fixed_linear,
        fixed_add,
        fixed_multiply,
        fixed_average_pool2d,
    }
)
