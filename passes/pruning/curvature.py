"""Second derivatives through single operators: the rules of the backward recursion of `obd`.

Given the second derivatives `h` of a loss with respect to an operator's output, element by element,
a rule gives those with respect to its arguments. For an output `y = f(x)`, with all second
derivatives of `f` dropped (Gauss-Newton, Levenberg-Marquardt) and all mixed ones of the loss, it is

    h_x[j] = sum_i (dy_i / dx_j)^2 h_y[i]

Four kinds of operators make this cheap, since their squared Jacobian is a Jacobian again, and so
one call of PyTorch's own backward: those that route elements (coefficients 0 and 1), those that
are pointwise (diagonal), bilinear ones (squared operands), and averages (equal coefficients).
Layer normalisation has a rule of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from shohin.errors import UnsupportedError
from shohin.passes.analyses.operators import WEIGHTED, is_random
from shohin.passes.patterns import argument

_aten = torch.ops.aten

Parts: TypeAlias = dict[int, Tensor]
"""Second derivatives of those outputs of a node that have any; a lone output has position 0."""


def _overloads(names: str) -> frozenset[object]:
    """Operators by name; those that this version of PyTorch does not have are left out."""
    found = (name.partition(".") for name in names.split())
    packets = ((getattr(_aten, name, None), overload or "default") for name, _, overload in found)
    return frozenset(getattr(packet, overload) for packet, overload in packets if packet)


ROUTING = _overloads(
    "view reshape _unsafe_view flatten.using_ints unflatten.int permute transpose.int t movedim.int"
    " squeeze squeeze.dim squeeze.dims unsqueeze expand contiguous clone alias slice.Tensor"
    " select.int narrow cat stack split.Tensor split_with_sizes chunk unbind.int pad flip roll"
    " constant_pad_nd dropout feature_dropout pixel_shuffle channel_shuffle repeat to.dtype"
    " max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool2d"
    " upsample_nearest2d.vec sum sum.dim_IntList"
)
POINTWISE = _overloads(
    "relu relu6 hardtanh leaky_relu elu selu celu softplus log_sigmoid sigmoid tanh gelu silu mish"
    " hardswish hardsigmoid exp log sqrt rsqrt abs neg square pow.Tensor_Scalar clamp reciprocal"
    " add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar mul.Tensor mul.Scalar div.Tensor"
    " div.Scalar maximum minimum where.self batch_norm"
)
BILINEAR = WEIGHTED | _overloads("mm bmm matmul addmm baddbmm")
_SCALED = _overloads("addmm baddbmm")
NORMALISING = _overloads("layer_norm")
AVERAGES = _overloads(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool2d mean mean.dim"
)


@dataclass(frozen=True)
class Call:
    """One evaluation of a node.

    Attributes:
        node: a ``call_function`` node.
        values: what its arguments evaluate to, by node.
        wanted: those of its arguments whose second derivatives are asked for.
    """

    node: fx.Node
    values: Mapping[fx.Node, Any]
    wanted: tuple[fx.Node, ...]

    def run(self, replaced: Mapping[fx.Node, Tensor]) -> tuple[Any, ...]:
        """The node's outputs with some of its arguments replaced."""

        def value(source: fx.Node) -> Any:
            return replaced[source] if source in replaced else self.values[source]

        arguments = cast("tuple[Any, ...]", map_arg(self.node.args, value))
        keywords = cast("dict[str, Any]", map_arg(dict(self.node.kwargs), value))
        result = cast("Callable[..., Any]", self.node.target)(*arguments, **keywords)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


Rule: TypeAlias = Callable[[Call, Parts], dict[fx.Node, Tensor]]


def pull_back(call: Call, curvature: Parts) -> dict[fx.Node, Tensor]:
    """Second derivatives with respect to a node's arguments, from those of its outputs.

    Args:
        call: the node, what its arguments are, and which of them are wanted.
        curvature: second derivatives of its outputs, each of that output's shape.

    Returns:
        Second derivatives of the shape of each wanted argument.

    Raises:
        UnsupportedError: naming the node, when there is no rule for its operator.
    """
    rule = _rule_of(call)
    with torch.enable_grad():
        return rule(call, curvature)


def obstacle(node: fx.Node, wanted: tuple[fx.Node, ...]) -> UnsupportedError | None:
    """The error of `pull_back` where a node has no rule; None where it has one.

    Args:
        node: a ``call_function`` node.
        wanted: those of its arguments whose second derivatives are asked for.
    """
    try:
        _rule_of(Call(node, {}, wanted))
    except UnsupportedError as error:
        return error
    return None


def _rule_of(call: Call) -> Rule:
    target = call.node.target
    if is_random(call.node) or argument(call.node, "training") is True:
        raise _unsupported(call.node, "it behaves as in training")
    normalises = target is _aten.batch_norm.default or target in NORMALISING
    if normalises and call.wanted != (argument(call.node, "input"),):
        raise _unsupported(call.node, "its parameters are asked for")
    if target in _SCALED and any(argument(call.node, one) != 1 for one in ("alpha", "beta")):
        raise _unsupported(call.node, "it scales its operands")
    for operators, rule in _RULES:
        if target in operators:
            return rule
    raise _unsupported(call.node, f"there is no rule for {target}")


def _unsupported(node: fx.Node, reason: str) -> UnsupportedError:
    problem = f"second derivatives cannot be taken through it: {reason}"
    return UnsupportedError(f"node '{node.name}'", problem, "rank the weights by magnitude or obs")


def _backward(call: Call, at: Mapping[fx.Node, Tensor], weights: Parts) -> dict[fx.Node, Tensor]:
    """Transposed Jacobian of a call, at given values of the wanted arguments, times weights."""
    inputs = {source: value.detach().requires_grad_() for source, value in at.items()}
    outputs = call.run(inputs)
    found = torch.autograd.grad(
        [outputs[position] for position in weights], list(inputs.values()), list(weights.values())
    )
    return dict(zip(inputs, found, strict=True))


def _wanted_values(call: Call) -> dict[fx.Node, Tensor]:
    return {source: call.values[source] for source in call.wanted}


def _route(call: Call, curvature: Parts) -> dict[fx.Node, Tensor]:
    return _backward(call, _wanted_values(call), curvature)


def _pointwise(call: Call, curvature: Parts) -> dict[fx.Node, Tensor]:
    h = curvature[0]
    values = _wanted_values(call)
    # An argument that is broadcast stands for several elements, whose derivatives add up only
    # after they are squared.
    spread = {source: value.expand(h.shape) for source, value in values.items()}
    slopes = _backward(call, spread, {0: torch.ones_like(h)})
    return {
        source: (h * slopes[source] ** 2).sum_to_size(values[source].shape) for source in slopes
    }


def _bilinear(call: Call, curvature: Parts) -> dict[fx.Node, Tensor]:
    squared = {source: call.values[source].detach() ** 2 for source in call.node.all_input_nodes}
    again = Call(call.node, squared, call.wanted)
    return _backward(again, _wanted_values(again), curvature)


def _normalise(call: Call, curvature: Parts) -> dict[fx.Node, Tensor]:
    """Layer normalisation ``y = w a + b`` of rows of `n` elements, ``a = (x - mean) / deviation``.

    With ``dy_i / dx_j = w_i / deviation (d_ij - (1 + a_i a_j) / n)`` the sum over `i` of its square
    times `h_i` only needs three sums over each row.
    """
    (source,) = call.wanted
    x = call.values[source].detach()
    axes = tuple(range(-len(argument(call.node, "normalized_shape")), 0))
    count = x[(0,) * (x.dim() - len(axes))].numel()
    variance = x.var(axes, correction=0, keepdim=True) + argument(call.node, "eps")
    a = (x - x.mean(axes, keepdim=True)) / variance.sqrt()
    gain = argument(call.node, "weight")
    scale = 1.0 if gain is None else call.values[gain].detach() ** 2
    g = curvature[0] * scale / variance
    zeroth, first, second = ((g * a**power).sum(axes, keepdim=True) for power in range(3))
    spread = (zeroth + 2 * a * first + a**2 * second) / count**2
    return {source: g * (1 - 2 * (1 + a**2) / count) + spread}


def _average(call: Call, curvature: Parts) -> dict[fx.Node, Tensor]:
    (source,) = call.wanted
    coefficients = _coefficients(call.node, call.values[source], curvature[0])
    return _route(call, {0: curvature[0] * coefficients})


def _coefficients(node: fx.Node, x: Tensor, y: Tensor) -> Tensor | float:
    """What an average multiplies each element of a window by, along the output's axes."""
    if node.target in (_aten.mean.default, _aten.mean.dim):
        return y.numel() / x.numel()
    if node.target is _aten.avg_pool2d.default:
        ones = torch.ones((1, 1, *x.shape[-2:]), dtype=x.dtype)
        return _window_coefficients(node, ones)
    axes = len(argument(node, "output_size"))
    return _adaptive_coefficients(x.shape[-axes:], y.shape[-axes:]).to(x.dtype)


def _window_coefficients(node: fx.Node, ones: Tensor) -> Tensor:
    """Share of one element in each window of ``avg_pool2d``, over `[1, 1, height, width]`."""
    sizes = [argument(node, name) for name in ("kernel_size", "stride", "padding", "ceil_mode")]
    counted = argument(node, "count_include_pad", True)
    divisor = argument(node, "divisor_override", None)
    shares = _aten.avg_pool2d.default(ones, *sizes, counted, divisor)
    elements = _aten.avg_pool2d.default(ones, *sizes, counted, 1)
    return cast("Tensor", shares / elements)


def _adaptive_coefficients(sizes: Sequence[int], pooled_sizes: Sequence[int]) -> Tensor:
    """One over the number of elements of each window of an adaptive average pool."""
    product = torch.ones(())
    for size, pooled in zip(sizes, pooled_sizes, strict=True):
        counts = [-(-(i + 1) * size // pooled) - i * size // pooled for i in range(pooled)]
        product = product.unsqueeze(-1) / torch.tensor(counts)
    return product


_RULES: tuple[tuple[frozenset[Any], Rule], ...] = (
    (ROUTING, _route),
    (POINTWISE, _pointwise),
    (BILINEAR, _bilinear),
    (AVERAGES, _average),
    (NORMALISING, _normalise),
)
