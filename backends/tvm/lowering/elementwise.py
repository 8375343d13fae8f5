"""Selection of element-wise operators."""

import math
from typing import Any

import torch
from torch import Tensor, fx

from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.lowering.operations import Elementwise, FusedStep, Value, View
from shohin.backends.tvm.lowering.select import Handler, Selector

aten = torch.ops.aten

_UNARY: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.hardsigmoid.default: "hard-sigmoid",
    aten.hardswish.default: "hard-swish",
    aten.tanh.default: "tanh",
    aten.neg.default: "negate",
    aten.abs.default: "abs",
}
_BINARY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "subtract",
    aten.mul.Tensor: "multiply",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
}
_FLIPPED = {"subtract": "subtract-from"}


def _emit(selector: Selector, node: fx.Node, x: Value, *steps: FusedStep) -> bool:
    label = selector.label(node, "+".join(step.step.kind for step in steps))
    selector.emit(Elementwise(selector.result(node), label, x, steps=list(steps)))
    return True


def _eligible(selector: Selector, node: fx.Node, x: Value | None) -> bool:
    fake = selector.fakes[node]
    return (
        x is not None
        and x.constant is None
        and isinstance(fake, Tensor)
        and fake.dtype == x.dtype == torch.float32
        and tuple(fake.shape) == x.shape
        and x.elements > 0
    )


def select_unary(selector: Selector, node: fx.Node) -> bool:
    """Operators of one operand without options."""
    x = selector.tensor(node, "self")
    if x is None or not _eligible(selector, node, x):
        return False
    return _emit(selector, node, x, FusedStep(Step(_UNARY[node.target])))


def select_clamp(selector: Selector, node: fx.Node) -> bool:
    """``hardtanh``, ``relu6``, ``clamp``, ``clamp_min`` and ``clamp_max``."""
    x = selector.tensor(node, "self")
    if x is None or not _eligible(selector, node, x):
        return False
    if node.target is aten.relu6.default:
        low, high = 0.0, 6.0
    elif node.target is aten.hardtanh.default:
        low, high = selector.argument(node, "min_val"), selector.argument(node, "max_val")
    else:
        low, high = selector.argument(node, "min"), selector.argument(node, "max")
    bounds = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
    return _emit(selector, node, x, FusedStep(Step("clamp", bounds)))


def select_gelu(selector: Selector, node: fx.Node) -> bool:
    """``aten.gelu`` in both forms."""
    x = selector.tensor(node, "self")
    if x is None or not _eligible(selector, node, x):
        return False
    kind = "gelu-tanh" if selector.argument(node, "approximate") == "tanh" else "gelu"
    return _emit(selector, node, x, FusedStep(Step(kind)))


def select_sloped(selector: Selector, node: fx.Node) -> bool:
    """``leaky_relu`` and plain ``elu``."""
    x = selector.tensor(node, "self")
    if x is None or not _eligible(selector, node, x):
        return False
    if node.target is aten.leaky_relu.default:
        slope = float(selector.argument(node, "negative_slope"))
        return _emit(selector, node, x, FusedStep(Step("leaky-relu", (slope,))))
    if selector.argument(node, "scale") != 1 or selector.argument(node, "input_scale") != 1:
        return False
    alpha = float(selector.argument(node, "alpha"))
    return _emit(selector, node, x, FusedStep(Step("elu", (alpha,))))


def select_binary(selector: Selector, node: fx.Node) -> bool:
    """Two tensors of one shape, a tensor and a number, or a tensor and one number a channel."""
    kind = _BINARY[node.target]
    left, right = (selector.argument(node, name) for name in ("self", "other"))
    if selector.argument(node, "alpha", 1) != 1:
        return False
    x = selector.values.get(left) if isinstance(left, fx.Node) else None
    y = selector.values.get(right) if isinstance(right, fx.Node) else None
    if x is not None and y is not None and not _eligible(selector, node, x):
        x, y, kind = y, x, _FLIPPED.get(kind, kind)
    if x is None or not _eligible(selector, node, x):
        return False
    if y is None:
        return isinstance(right, (int, float)) and _with_number(selector, node, x, kind, right)
    if y.dtype == torch.float32 and y.shape == x.shape and y.constant is None:
        return _emit(selector, node, x, FusedStep(Step(kind, operand="full"), y))
    channels = channel_numbers(x, y)
    if channels is None:
        return False
    return _emit(selector, node, x, FusedStep(Step(kind, operand="channel"), channels))


def _with_number(selector: Selector, node: fx.Node, x: Value, kind: str, scalar: float) -> bool:
    return _emit(selector, node, x, FusedStep(Step(f"{kind}-scalar", (float(scalar),))))


def select_divide(selector: Selector, node: fx.Node) -> bool:
    """Division by a number, where the reciprocal is exact or nearly so."""
    x = selector.tensor(node, "self")
    divisor = selector.argument(node, "other")
    if x is None or not _eligible(selector, node, x) or not isinstance(divisor, (int, float)):
        return False
    return divisor != 0 and _with_number(selector, node, x, "multiply", 1.0 / divisor)


def channel_numbers(x: Value, operand: Value) -> Value | None:
    """The operand as one number a channel of x, if that is what broadcasting makes of it.

    The channel is axis 1 of an image, else the last axis.
    """
    constant = operand.constant
    if constant is None or constant.dtype != torch.float32:
        return None
    axis = 1 if len(x.shape) == 4 else len(x.shape) - 1
    sizes = (1,) * (len(x.shape) - len(operand.shape)) + operand.shape
    wanted = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    if sizes != wanted:
        return None
    return Value(operand.name, (x.shape[axis],), torch.float32, constant.reshape(-1))


def select_batch_norm(selector: Selector, node: fx.Node) -> bool:
    """Batch norm that could not be folded: a scale and a shift a channel (in float64)."""
    x = selector.tensor(node, "input")
    if x is None or not _eligible(selector, node, x) or len(x.shape) not in (2, 4):
        return False
    if selector.argument(node, "training"):
        return False
    mean, variance, weight, bias = (
        _numbers(selector.tensor(node, name))
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None:
        return False
    scale = torch.rsqrt(variance + float(selector.argument(node, "eps")))
    scale = scale * weight if weight is not None else scale
    shift = (bias if bias is not None else torch.zeros_like(mean)) - mean * scale
    steps = [
        FusedStep(Step(kind, operand="channel"), _channel_value(f"{node.name}_{kind}", numbers))
        for kind, numbers in (("multiply", scale), ("add", shift))
    ]
    return _emit(selector, node, x, *steps)


def _numbers(value: Value | None) -> Tensor | None:
    return None if value is None or value.constant is None else value.constant.double()


def _channel_value(name: str, numbers: Tensor) -> Value:
    return Value(name, tuple(numbers.shape), torch.float32, numbers.float())


def select_identity(selector: Selector, node: fx.Node) -> bool:
    """Operators that change nothing at inference."""
    if node.target is aten.dropout.default and selector.argument(node, "train"):
        return False
    x = selector.passable(node.args[0])
    fake = selector.fakes[node]
    if x is None or not isinstance(fake, Tensor) or not (x.fixed or fake.dtype == x.dtype):
        return False
    selector.emit(View(selector.passed(node, x), selector.label(node, "identity"), x))
    return True


PASSING = frozenset(
    {
        aten.dropout.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
    }
)
"""Operators that give what they are given."""

HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(_UNARY, select_unary),
    **dict.fromkeys(_BINARY, select_binary),
    aten.hardtanh.default: select_clamp,
    aten.relu6.default: select_clamp,
    aten.clamp.default: select_clamp,
    aten.clamp_min.default: select_clamp,
    aten.gelu.default: select_gelu,
    aten.leaky_relu.default: select_sloped,
    aten.elu.default: select_sloped,
    aten.div.Tensor: select_divide,
    aten.batch_norm.default: select_batch_norm,
    aten.dropout.default: select_identity,
    aten.clone.default: select_identity,
    aten.contiguous.default: select_identity,
    aten.alias.default: select_identity,
    aten.detach.default: select_identity,
}
