"""Selection of fixed-point operators, and of those that pass integers on.

In the graph every number is a real one that lies on a grid. Here they are the integers, of 8 or 16
bits; whoever else reads them gets them converted. Results of 32 bits are for such readers alone:
they are converted while they are in registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.lowering.operations import (
    Elementwise,
    FixedAverage,
    FixedConvolution,
    FixedLinear,
    FixedWeights,
    FusedStep,
    Value,
)
from shohin.backends.tvm.lowering.select import Selector
from shohin.ir import fixed_ops as ops
from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.fixed_point import MOST_APART, integers, largest_sums, limits

aten = torch.ops.aten
_BYTE, _WORD, _SUM = 8, 16, 32

FixedHandler: TypeAlias = Callable[[Selector, fx.Node, ActivationFormat], bool]


def select_fixed(selector: Selector, node: fx.Node) -> bool:
    """Emit a node whose result has a fixed-point format, and whose operands are integers."""
    carried = annotation(node, ActivationFormat)
    handler = _HANDLERS.get(node.target)
    return carried is not None and handler is not None and handler(selector, node, carried)


@dataclass(frozen=True)
class _Source:
    """Integers that an operator reads.

    Attributes:
        value: the integers.
        format: how they are read.
    """

    value: Value
    format: ActivationFormat


def _source(selector: Selector, node: fx.Node, name: str) -> _Source | None:
    """The integers of an operand, converted from real numbers on a grid if need be."""
    operand = selector.argument(node, name)
    carried = annotation(operand, ActivationFormat) if isinstance(operand, fx.Node) else None
    if carried is None or carried.bits > _WORD:
        return None
    if operand not in selector.fixed:
        selector.flush_for(operand)
        selector.fixed[operand] = _from_real(selector, operand, selector.values[operand], carried)
    return _Source(selector.fixed[operand], carried)


def _from_real(selector: Selector, node: fx.Node, x: Value, made: ActivationFormat) -> Value:
    value = Value(node.name, x.shape, _type_of(made), fixed=True)
    step = _round_step(made, "nearest-even")
    selector.emit(Elementwise(value, selector.label(node, "to integers"), x, steps=[step]))
    return value


def _type_of(carried: ActivationFormat) -> torch.dtype:
    if carried.bits > _WORD:
        return torch.float32
    return torch.int8 if carried.bits <= _BYTE else torch.int16


def _bounds(carried: ActivationFormat) -> tuple[int, int]:
    return limits(carried.bits)


def _is_nearest(node: fx.Node) -> int:
    return int(str(node.kwargs.get("rounding", "nearest-even")) == "nearest-even")


def _round_step(made: ActivationFormat, rounding: str) -> FusedStep:
    nearest = int(rounding == "nearest-even")
    return FusedStep(Step("fixed-round", (made.fraction, *_bounds(made), nearest)))


def _finishing(made: ActivationFormat) -> list[FusedStep]:
    """What makes real numbers of results that only float operators read."""
    return [FusedStep(Step("fixed-real", (made.fraction,)))] if made.bits > _WORD else []


def _define(selector: Selector, node: fx.Node, made: ActivationFormat) -> Value:
    """The result of a node: integers, or real numbers where they have 32 bits."""
    fake = selector.fakes[node]
    if not isinstance(fake, Tensor):
        raise AssertionError("fixed-point operators give tensors")
    real = made.bits > _WORD
    sizes = tuple(int(size) for size in fake.shape)
    value = Value(node.name, sizes, _type_of(made), fixed=not real)
    (selector.values if real else selector.fixed)[node] = value
    return value


def select_quantize(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``shohin.fixed_quantize``: of real numbers, or of integers of another format."""
    operand = selector.argument(node, "input")
    if operand in selector.fixed:
        source = _source(selector, node, "input")
        if source is None:
            return False
        shift = source.format.fraction - made.fraction
        step = FusedStep(Step("fixed-rescale", (shift, *_bounds(made), _is_nearest(node))))
        _emit_steps(selector, node, made, source.value, [step, *_finishing(made)], "rescale")
        return True
    selector.flush_for(operand)
    x = selector.values.get(operand)
    if x is None or x.dtype != torch.float32 or made.bits > _WORD:
        return False
    rounding = str(node.kwargs.get("rounding", "nearest-even"))
    value = _define(selector, node, made)
    label = selector.label(node, "to integers")
    selector.emit(Elementwise(value, label, x, steps=[_round_step(made, rounding)]))
    return True


def _emit_steps(
    selector: Selector,
    node: fx.Node,
    made: ActivationFormat,
    x: Value,
    steps: list[FusedStep],
    what: str,
) -> None:
    value = _define(selector, node, made)
    others = [step.operand for step in steps if step.operand is not None]
    value.nonnegative = x.nonnegative and all(one.nonnegative for one in others)
    selector.emit(Elementwise(value, selector.label(node, what), x, steps=steps))


def select_conv2d(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``shohin.fixed_conv2d``."""
    source = _source(selector, node, "input")
    if source is None or len(source.value.shape) != 4:
        return False
    weights, rescale = _layer(selector, node, source.format, made)
    y = _define(selector, node, made)
    stride, padding, dilation = (
        tuple(int(one) for one in selector.argument(node, name))
        for name in ("stride", "padding", "dilation")
    )
    groups = int(selector.argument(node, "groups"))
    kind = "conv" if groups == 1 else f"conv/{groups}"
    window = "x".join(str(int(size)) for size in weights.codes.shape[2:])
    sizes = "x".join(str(size) for size in y.shape[2:])
    label = f"fixed {kind} {window} {source.value.shape[1]}->{y.shape[1]} {sizes}"
    selector.emit(
        FixedConvolution(
            y,
            selector.label(node, label),
            source.value,
            weights,
            (stride[0], stride[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            (dilation[0], dilation[1]),
            groups,
            steps=[rescale, *_finishing(made)],
        )
    )
    return True


def select_linear(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``shohin.fixed_linear``."""
    source = _source(selector, node, "input")
    if source is None:
        return False
    weights, rescale = _layer(selector, node, source.format, made)
    y = _define(selector, node, made)
    outputs, inputs = weights.codes.shape
    label = selector.label(node, f"fixed linear {inputs}->{outputs}")
    steps = [rescale, *_finishing(made)]
    selector.emit(FixedLinear(y, label, source.value, weights, steps=steps))
    return True


def _layer(
    selector: Selector, node: fx.Node, data: ActivationFormat, made: ActivationFormat
) -> tuple[FixedWeights, FusedStep]:
    """The integers of a layer, and the step that rescales its sums."""
    fractions = [int(one) for one in selector.argument(node, "weight_fractions")]
    radix = torch.tensor(fractions) + data.fraction
    codes, bits = _codes(selector, node, fractions)
    biases = _biases(selector, node, radix.expand(len(codes)))
    shifts = radix - made.fraction
    rounding = float(1 << max(0, int(shifts.max()) - 1))
    largest = largest_sums(codes, biases, data.bits)
    wide = bool(largest.numel()) and float(largest.max()) + rounding >= 2 ** (_SUM - 1)
    bounds = (*_bounds(made), _is_nearest(node))
    if len(fractions) == 1:
        rescale = FusedStep(Step("fixed-rescale", (int(shifts[0]), *bounds)))
    else:
        shift_value = Value(
            f"{node.name}_shifts", (len(codes),), torch.int32, shifts.to(torch.int32)
        )
        step = Step("fixed-rescale", bounds, "channel", "int32")
        rescale = FusedStep(step, shift_value)
    return FixedWeights(codes, bits, biases, wide), rescale


def _codes(selector: Selector, node: fx.Node, fractions: list[int]) -> tuple[Tensor, int]:
    """The integers of a weight, and the bits that they need."""
    value = selector.tensor(node, "weight")
    if value is None or value.constant is None:
        raise AssertionError("weights of fixed-point operators are constants")
    weight = value.constant
    if len(fractions) == 1:
        codes = integers(weight, fractions[0])
    else:
        rows = zip(weight, fractions, strict=True)
        codes = torch.stack([integers(row, fraction) for row, fraction in rows])
    largest = int(codes.abs().max()) if codes.numel() else 0
    bits = largest.bit_length() + 1
    return codes.to(torch.int8 if bits <= _BYTE else torch.int16), bits


def _biases(selector: Selector, node: fx.Node, radix: Tensor) -> Tensor:
    value = selector.tensor(node, "bias")
    if value is None or value.constant is None:
        return torch.zeros(len(radix), dtype=torch.int64)
    return (value.constant.double() * 2.0 ** radix.double()).round().long()


def select_add(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``shohin.fixed_add``."""
    one, two = (_source(selector, node, name) for name in ("input", "other"))
    if one is None or two is None or one.value.shape != two.value.shape:
        return False
    radix = max(one.format.fraction, two.format.fraction)
    left = (radix - one.format.fraction, radix - two.format.fraction)
    if max(left) > MOST_APART:
        return False
    numbers = (*left, radix - made.fraction, *_bounds(made), _is_nearest(node))
    step = _with_operand("fixed-add", numbers, two.value)
    _emit_steps(selector, node, made, one.value, [step, *_finishing(made)], "fixed add")
    return True


def select_multiply(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``shohin.fixed_multiply``."""
    one, two = (_source(selector, node, name) for name in ("input", "other"))
    if one is None or two is None or one.value.shape != two.value.shape:
        return False
    shift = one.format.fraction + two.format.fraction - made.fraction
    step = _with_operand("fixed-multiply", (shift, *_bounds(made), _is_nearest(node)), two.value)
    _emit_steps(selector, node, made, one.value, [step, *_finishing(made)], "fixed multiply")
    return True


def _with_operand(kind: str, numbers: tuple[float, ...], operand: Value) -> FusedStep:
    element = str(operand.dtype).removeprefix("torch.")
    return FusedStep(Step(kind, numbers, "full", element), operand)


def select_average(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``shohin.fixed_average_pool2d``."""
    source = _source(selector, node, "input")
    if source is None or len(source.value.shape) != 4:
        return False
    kernel, stride, padding = (
        tuple(int(one) for one in selector.argument(node, name))
        for name in ("kernel", "stride", "padding")
    )
    shift = source.format.fraction + int(selector.argument(node, "shift")) - made.fraction
    step = FusedStep(Step("fixed-rescale", (shift, *_bounds(made), _is_nearest(node))))
    y = _define(selector, node, made)
    y.nonnegative = source.value.nonnegative
    label = selector.label(node, f"fixed average {kernel[0]}x{kernel[1]}")
    selector.emit(
        FixedAverage(
            y,
            label,
            source.value,
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            (padding[0], padding[1], padding[2], padding[3]),
            int(selector.argument(node, "multiplier")),
            steps=[step, *_finishing(made)],
        )
    )
    return True


def select_relu(selector: Selector, node: fx.Node, made: ActivationFormat) -> bool:
    """``aten.relu`` of integers."""
    if selector.argument(node, "self") not in selector.fixed:
        return False
    source = _source(selector, node, "self")
    if source is None:
        return False
    step = FusedStep(Step("fixed-relu"))
    _emit_steps(selector, node, made, source.value, [step], "relu")
    selector.fixed[node].nonnegative = True
    return True


_HANDLERS: dict[Any, FixedHandler] = {
    ops.fixed_quantize: select_quantize,
    ops.fixed_conv2d: select_conv2d,
    ops.fixed_linear: select_linear,
    ops.fixed_add: select_add,
    ops.fixed_multiply: select_multiply,
    ops.fixed_average_pool2d: select_average,
    aten.relu.default: select_relu,
}
