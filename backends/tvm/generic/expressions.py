"""Small helpers over TIR expressions: substitution, loads, linear indices, cost."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import tvm_ffi
from tvm import ir, tirx
from tvm.sym import Analyzer, detect_linear_equation

Expr: TypeAlias = Any
Buffer: TypeAlias = Any
Stmt: TypeAlias = Any

INDEX = "int64"
"""Type of index arithmetic, as TVM's legaliser makes it."""

_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Max, tirx.Min, tirx.And, tirx.Or, tirx.Select,
    tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE,
)  # fmt: skip
_DIVISION = (tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod)
_CHEAP_CALLS = {"if_then_else", "fabs", "sqrt", "shift_left", "shift_right"}
_CALL_COST = 20.0
_DIVISION_COST = 4.0
_LOAD_COST = 0.5


class RefusedError(ValueError):
    """The generic route cannot compile something, for a reason that means something to people."""


@dataclass(frozen=True)
class Axis:
    """A loop of a stage: its variable, and how many steps it makes."""

    variable: Expr
    extent: int


def constant(value: int) -> Expr:
    """An index constant."""
    return tirx.IntImm(INDEX, value)


def new_axis(name: str, extent: int) -> Axis:
    """An axis with a fresh variable."""
    return Axis(tirx.Var(name, INDEX), extent)


def dtype_of(expression: Expr) -> str:
    """The type of a scalar expression as text."""
    return str(expression.ty.dtype)


def int_of(value: Any) -> int:
    """A constant extent as a Python integer.

    Raises:
        ValueError: the extent is not a constant.
    """
    if isinstance(value, int):
        return value
    if not isinstance(value, tirx.IntImm):
        raise ValueError(f"expected a constant extent, got {value}")
    return int(value.value)


def shape_of(buffer: Buffer) -> tuple[int, ...]:
    """The shape of a buffer as Python integers."""
    return tuple(int_of(extent) for extent in buffer.shape)


def substitute(node: Any, values: Mapping[Any, Expr]) -> Any:
    """The expression or statement with variables (buffers too) replaced."""
    if not values:
        return node
    return tvm_ffi.structural_map(
        node, (tirx.Var, lambda variable: values.get(variable, variable)), order="post"
    )


def map_loads(node: Any, replace: Callable[[Any], Expr]) -> Any:
    """The expression with every load, its indices already mapped, replaced."""
    return tvm_ffi.structural_map(node, (ir.TensorLoad, replace), order="post")


def loads(*nodes: Any) -> list[Any]:
    """Every load in the expressions, loads inside indices included."""
    found: list[Any] = []
    for node in nodes:
        tvm_ffi.structural_walk(node, (ir.TensorLoad, found.append))
    return found


def buffers(*nodes: Any) -> set[str]:
    """Names of the buffers that the expressions or statements mention."""
    found: set[str] = set()

    def visit(variable: Any) -> None:
        if tirx.is_buffer_var(variable):
            found.add(variable.name)

    for node in nodes:
        tvm_ffi.structural_walk(node, (tirx.Var, visit))
    return found


def contains(node: Any, kinds: type | tuple[type, ...]) -> bool:
    """Whether a node of some kind occurs."""
    found: list[Any] = []
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        tvm_ffi.structural_walk(node, (kind, found.append))
    return bool(found)


def variables(node: Any) -> set[Any]:
    """Every variable of an expression."""
    found: set[Any] = set()
    tvm_ffi.structural_walk(node, (tirx.Var, found.add))
    return found


def linear(indices: Sequence[Expr], shape: Sequence[int]) -> Expr:
    """The row-major position of an element."""
    total = constant(0)
    for index, extent in zip(indices, shape, strict=True):
        total = total * constant(extent) + as_index(index)
    return total


def as_index(expression: Expr) -> Expr:
    """The expression in the type of index arithmetic."""
    return expression if dtype_of(expression) == INDEX else tirx.Cast(INDEX, expression)


def analyzer_for(axes: Iterable[Axis]) -> Any:
    """An analyzer that knows the range of every axis."""
    analyzer = Analyzer()
    for axis in axes:
        analyzer.bind(axis.variable, ir.Range(constant(0), constant(max(axis.extent, 1))))
    return analyzer


def coefficients(expression: Expr, axes: Sequence[Axis]) -> tuple[int, ...] | None:
    """Constant factors of the axes where the expression is affine in them."""
    found = detect_linear_equation(expression, [axis.variable for axis in axes])
    if len(found) == 0 or not all(isinstance(factor, tirx.IntImm) for factor in found[:-1]):
        return None
    return tuple(int(factor.value) for factor in found[:-1])


def reshape_indices(
    indices: Sequence[Expr], source: Sequence[int], target: Sequence[int]
) -> list[Expr]:
    """Indices into `target` of the element at `indices` of `source`, both row-major.

    Axes are matched in the smallest groups of equal size, so that only axes that were really
    merged or split need a division.
    """
    result: list[Expr] = []
    left, right = 0, 0
    while right < len(target):
        stop, end = _next_group(source, target, left, right)
        group = linear(indices[left:stop], source[left:stop])
        result.extend(spread(group, target[right:end]))
        left, right = stop, end
    return result


def _next_group(
    source: Sequence[int], target: Sequence[int], left: int, right: int
) -> tuple[int, int]:
    """Ends of the next groups of axes with equal products."""
    stop, end = left, right + 1
    products = [1, target[right]]
    while products[0] != products[1]:
        if products[0] < products[1]:
            products[0] *= source[stop]
            stop += 1
        else:
            products[1] *= target[end]
            end += 1
    return stop, end


def spread(position: Expr, shape: Sequence[int]) -> list[Expr]:
    """Row-major indices of a position inside a group of axes."""
    wide = [axis for axis, extent in enumerate(shape) if extent > 1]
    result = [constant(0)] * len(shape)
    for axis in wide:
        inner = math.prod(shape[axis + 1 :])
        value = tirx.floordiv(position, constant(inner)) if inner > 1 else position
        result[axis] = value if axis == wide[0] else tirx.floormod(value, constant(shape[axis]))
    return result


def cost(expression: Expr) -> float:
    """Rough scalar operations to compute an expression once, index arithmetic left out."""
    return _LOAD_COST * len(loads(expression)) + arithmetic_cost(expression)


def arithmetic_cost(expression: Expr) -> float:
    """Rough scalar operations of an expression without its loads and their indices."""
    hollow = map_loads(expression, lambda load: tirx.const(1, dtype_of(load)))
    total = 0.0

    def visit(node: Any) -> None:
        nonlocal total
        total += _node_cost(node)

    for kind in (*_BINARY, *_DIVISION, ir.Call):
        tvm_ffi.structural_walk(hollow, (kind, visit))
    return total


def _node_cost(node: Any) -> float:
    if isinstance(node, ir.Call):
        return 1.0 if node.op.name.partition(".")[2] in _CHEAP_CALLS else _CALL_COST
    return _DIVISION_COST if isinstance(node, _DIVISION) else 1.0
