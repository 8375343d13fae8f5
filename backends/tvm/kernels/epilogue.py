"""Element-wise steps applied to a result while it is still in registers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels import vector_math as vm
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Parameter, held, number
from shohin.backends.tvm.kernels.fixed_steps import PREFIX, apply_fixed_step, element_type

OperandKind = Literal["none", "full", "channel"]
Unary = Callable[[Expr], Expr]
Binary = Callable[[Expr, Expr], Expr]


@dataclass(frozen=True)
class Step:
    """One element-wise step.

    Attributes:
        kind: a key of `UNARY`, `BINARY`, ``"clamp"``, ``"leaky-relu"``, ``"elu"``, or a binary
            kind with ``"-scalar"``; or one of `fixed_steps`, for integers.
        constants: the step's numbers (bounds, slope, scalar).
        operand: the shape of the second operand: none, the result's own (``full``), or one number
            per channel.
        operand_type: element type of the second operand.
    """

    kind: str
    constants: tuple[float, ...] = ()
    operand: OperandKind = "none"
    operand_type: str = "float32"


def _relu(x: Expr) -> Expr:
    return vm.at_least(x, number(0.0, vm.lanes_of(x)))


def _negative_part(x: Expr) -> Expr:
    return vm.at_most(x, number(0.0, vm.lanes_of(x)))


def _silu(x: Expr) -> Expr:
    return x * vm.sigmoid(x)


def _hard_sigmoid(x: Expr) -> Expr:
    lanes = vm.lanes_of(x)
    return vm.clamp(x + number(3.0, lanes), 0.0, 6.0) * number(1.0 / 6.0, lanes)


def _hard_swish(x: Expr) -> Expr:
    return x * _hard_sigmoid(x)


def _negate(x: Expr) -> Expr:
    return x * number(-1.0, vm.lanes_of(x))


UNARY: dict[str, Unary] = {
    "relu": _relu,
    "sigmoid": vm.sigmoid,
    "silu": _silu,
    "hard-sigmoid": _hard_sigmoid,
    "hard-swish": _hard_swish,
    "tanh": vm.tanh,
    "gelu": vm.gelu,
    "gelu-tanh": vm.gelu_tanh,
    "negate": _negate,
    "abs": lambda x: T.max(x, _negate(x)),
}

BINARY: dict[str, Binary] = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "subtract-from": lambda x, y: y - x,
    "multiply": lambda x, y: x * y,
    "maximum": vm.at_least,
    "minimum": vm.at_most,
}


def apply_step(step: Step, x: Expr, operand: Expr | None) -> Expr:
    """The step's result.

    Args:
        step: what to do.
        x: the value, any number of lanes.
        operand: the second operand's lanes, None for steps without one.
    """
    lanes = vm.lanes_of(x)
    if step.kind.startswith(PREFIX):
        return apply_fixed_step(step.kind, step.constants, x, operand, lanes)
    if operand is not None:
        return BINARY[step.kind](x, operand)
    if step.kind in UNARY:
        return UNARY[step.kind](x)
    if step.kind == "clamp":
        return vm.clamp(x, step.constants[0], step.constants[1])
    if step.kind == "leaky-relu":
        return _relu(x) + number(step.constants[0], lanes) * _negative_part(x)
    if step.kind == "elu":
        negative = vm.exp(_negative_part(x)) - number(1.0, lanes)
        return _relu(x) + number(step.constants[0], lanes) * negative
    return BINARY[step.kind.removesuffix("-scalar")](x, number(step.constants[0], lanes))


def apply_steps(
    steps: tuple[Step, ...],
    x: Expr,
    operands: tuple[Buffer, ...],
    load_full: Callable[[Buffer], Expr],
    load_channel: Callable[[Buffer], Expr],
) -> Expr:
    """Apply steps in order.

    Args:
        steps: the steps.
        x: the value, any number of lanes.
        operands: one buffer per step that has an operand, in order.
        load_full: reads the lanes of a buffer of the result's shape at the result's place.
        load_channel: reads the lanes of a per-channel buffer.
    """
    remaining = iter(operands)
    for step in steps:
        operand = None
        if step.operand == "full":
            operand = load_full(next(remaining))
        elif step.operand == "channel":
            operand = load_channel(next(remaining))
        found = apply_step(step, x, operand)
        x = held(found, vm.lanes_of(x), element_type(found))
    return x


def operand_parameters(
    steps: tuple[Step, ...], full: tuple[int, ...], channels: int
) -> tuple[Parameter, ...]:
    """The pointer parameters of the steps' second operands.

    Args:
        steps: the steps.
        full: physical shape of the result.
        channels: length of a per-channel operand.
    """
    used = [step for step in steps if step.operand != "none"]
    return tuple(
        Parameter(f"operand{i}", full if s.operand == "full" else (channels,), s.operand_type)
        for i, s in enumerate(used)
    )
