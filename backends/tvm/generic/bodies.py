"""What one step of a nest does: store a value, or fold values and store the result."""

from typing import Any

from tvm import tirx

from shohin.backends.tvm.generic.expressions import (
    INDEX,
    Axis,
    Buffer,
    Expr,
    Stmt,
    constant,
    dtype_of,
    new_axis,
    substitute,
)
from shohin.backends.tvm.generic.nests import Nest

_REGISTER = 16


def loop(variable: Expr, count: Expr, body: Stmt, kind: Any = tirx.ForKind.SERIAL) -> Stmt:
    """``for variable in range(count)``."""
    return tirx.For(variable, tirx.const(0, dtype_of(variable)), count, kind, body)


def store_body(nest: Nest, lane: Axis | None) -> Stmt:
    """Store the value of one vector of elements.

    Args:
        nest: the nest; its innermost variable is still free.
        lane: the lanes of the vector, None for one element.
    """
    return _vector(lane, tirx.BufferStore(nest.target, nest.value, [nest.place]))


def fold_body(nest: Nest, lane: Axis | None, fold_lanes: int) -> Stmt:
    """Fold the values of one vector of elements, and store the results.

    Args:
        nest: the nest; its innermost variable is still free.
        lane: the lanes of the vector, None for one element.
        fold_lanes: lanes along the innermost fold, 1 for none.
    """
    if fold_lanes > 1:
        return _fold_in_lanes(nest, fold_lanes)
    total = _local(nest, lane.extent if lane else 1)
    place = lane.variable if lane else constant(0)
    update: Stmt = _vector(lane, _update(nest, total, place, nest.value))
    for axis in reversed(nest.folded):
        update = loop(axis.variable, constant(axis.extent), update)
    start = _vector(lane, tirx.BufferStore(total, nest.start, [place]))
    return tirx.SeqStmt(
        [_allocate(total), start, update, _vector(lane, _finish(nest, total, place))]
    )


def _fold_in_lanes(nest: Nest, width: int) -> Stmt:
    """Fold neighbouring values in lanes of their own, then the lanes, then the uneven end."""
    parts, total = _local(nest, width), _local(nest, 1)
    lane = new_axis("lane", width)
    axis = nest.folded[-1]
    counter = tirx.Var("k", INDEX)
    place = counter * constant(width) + lane.variable
    whole, rest = divmod(axis.extent, width)
    vector = substitute(nest.value, {axis.variable: place})
    wide = loop(
        counter, constant(whole), _vector(lane, _update(nest, parts, lane.variable, vector))
    )
    steps = [wide]
    if rest:
        end = tirx.Var("e", INDEX)
        single = substitute(nest.value, {axis.variable: constant(whole * width) + end})
        steps.append(loop(end, constant(rest), _update(nest, total, constant(0), single)))
    folded: Stmt = tirx.SeqStmt(steps) if rest else wide
    for outer in reversed(nest.folded[:-1]):
        folded = loop(outer.variable, constant(outer.extent), folded)
    return tirx.SeqStmt(
        [
            _allocate(parts),
            _allocate(total),
            _vector(lane, tirx.BufferStore(parts, nest.start, [lane.variable])),
            tirx.BufferStore(total, nest.start, [constant(0)]),
            folded,
            *_combine_lanes(nest, parts, total, width),
            _finish(nest, total, constant(0)),
        ]
    )


def _combine_lanes(nest: Nest, parts: Buffer, total: Buffer, width: int) -> list[Stmt]:
    """Halve the vector down to a register or less, then take its lanes one by one."""
    steps: list[Stmt] = []
    while width > 4:
        width //= 2
        half = new_axis("lane", width)
        upper = tirx.BufferLoad(parts, [half.variable + constant(width)])
        steps.append(_vector(half, _update(nest, parts, half.variable, upper)))
    for position in range(width):
        value = tirx.BufferLoad(parts, [constant(position)])
        steps.append(_update(nest, total, constant(0), value))
    return steps


def _vector(lane: Axis | None, statement: Stmt) -> Stmt:
    if lane is None:
        return statement
    # Every loop needs a variable of its own.
    own = new_axis("lane", lane.extent)
    statement = substitute(statement, {lane.variable: own.variable})
    return loop(own.variable, constant(own.extent), statement, tirx.ForKind.VECTORIZED)


def _local(nest: Nest, size: int) -> Buffer:
    return tirx.decl_buffer((size,), dtype_of(nest.value), name="total", scope="local")


def _allocate(buffer: Buffer) -> Stmt:
    return tirx.AllocBuffer(buffer, {"disable_lower_builtin": tirx.const(True, "bool")})


def _update(nest: Nest, total: Buffer, place: Expr, value: Expr) -> Stmt:
    return tirx.BufferStore(total, nest.combine(tirx.BufferLoad(total, [place]), value), [place])


def _finish(nest: Nest, total: Buffer, place: Expr) -> Stmt:
    result = tirx.BufferLoad(total, [place])
    if nest.epilogue:
        result = substitute(nest.epilogue[1], {nest.epilogue[0]: result})
    return tirx.BufferStore(nest.target, result, [nest.place])
