"""Stages over flat arrays, with their axes in the form that code generation likes.

Axes of extent one go, axes whose halves are used apart are split, neighbours that all arrays run
through in one stride are merged, and the innermost axis is cut where conditions on it change.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import tirx

from shohin.backends.tvm.generic.expressions import (
    Axis,
    Buffer,
    Expr,
    analyzer_for,
    arithmetic_cost,
    coefficients,
    constant,
    linear,
    loads,
    map_loads,
    new_axis,
    shape_of,
    substitute,
    variables,
)
from shohin.backends.tvm.generic.stages import Stage, Storage

_SPLITS = 12
_SEGMENTS = 6
_COMPARISONS: dict[type, Callable[[int], bool]] = {
    tirx.LT: lambda difference: difference < 0,
    tirx.LE: lambda difference: difference <= 0,
    tirx.GT: lambda difference: difference > 0,
    tirx.GE: lambda difference: difference >= 0,
}


@dataclass(frozen=True)
class Nest:
    """A stage over flat arrays.

    Attributes:
        axes: independent loops, outermost first.
        folded: reduced loops, outermost first; none for an elementwise stage.
        target: the flat array written.
        place: index into it.
        value: what is stored or folded.
        combine: how values are folded.
        start: the value that a fold starts from.
        epilogue: variable for the folded value, and what is stored.
        label: where it comes from, for people.
    """

    axes: tuple[Axis, ...]
    folded: tuple[Axis, ...]
    target: Buffer
    place: Expr
    value: Expr
    combine: Any
    start: Expr | None
    epilogue: tuple[Expr, Expr] | None
    label: str

    def expressions(self) -> tuple[Expr, ...]:
        """Every expression of the nest."""
        values = (self.place, self.value)
        return (*values, self.epilogue[1]) if self.epilogue else values

    def accesses(self) -> list[Expr]:
        """The index of every load and of the store."""
        return [self.place, *(load.indices[0] for load in loads(*self.expressions()))]

    def map(self, change: Callable[[Expr], Expr]) -> "Nest":
        """The nest with every expression changed."""
        epilogue = self.epilogue and (self.epilogue[0], change(self.epilogue[1]))
        return replace(self, place=change(self.place), value=change(self.value), epilogue=epilogue)

    def simplified(self) -> "Nest":
        """The nest with every expression simplified over the ranges of its axes."""
        return self.map(analyzer_for((*self.axes, *self.folded)).simplify)

    def replaced(self, old: Sequence[Axis], new: Sequence[Axis], values: dict[Any, Expr]) -> "Nest":
        """The nest with neighbouring axes replaced by others."""
        nest = self.map(lambda expression: substitute(expression, values))
        nest = replace(nest, axes=_swap(self.axes, old, new), folded=_swap(self.folded, old, new))
        return nest.simplified()

    def work(self) -> float:
        """Rough scalar operations of one store."""
        steps = math.prod(axis.extent for axis in self.folded)
        inner = arithmetic_cost(self.value) + len(loads(self.value))
        outer = arithmetic_cost(self.epilogue[1]) if self.epilogue else 0.0
        return steps * (inner + (self.combine is not None)) + outer + 1.0


def _swap(axes: tuple[Axis, ...], old: Sequence[Axis], new: Sequence[Axis]) -> tuple[Axis, ...]:
    if old[0] not in axes:
        return axes
    position = axes.index(old[0])
    return (*axes[:position], *new, *axes[position + len(old) :])


def flatten(stage: Stage, storage: Storage, flat: Mapping[str, Buffer]) -> Nest:
    """The stage over flat arrays.

    Args:
        stage: a stage.
        storage: its arrays.
        flat: the flat buffer of every array.
    """

    def flatten_load(load: Any) -> Expr:
        place = linear(load.indices, shape_of(load.source))
        return tirx.BufferLoad(flat[storage.root(load.source.name)], [place])

    reduction, epilogue = stage.reduction, stage.epilogue
    return Nest(
        axes=stage.axes,
        folded=reduction.axes if reduction else (),
        target=flat[storage.root(stage.target.name)],
        place=linear(stage.indices, shape_of(stage.target)),
        value=map_loads(stage.value, flatten_load),
        combine=reduction.combine if reduction else None,
        start=reduction.start if reduction else None,
        epilogue=epilogue and (epilogue[0], map_loads(epilogue[1], flatten_load)),
        label=stage.label,
    )


def canonical(nest: Nest) -> Nest:
    """The same nest with as few and as regular axes as its accesses allow."""
    nest = _drop_units(nest).simplified()
    for _ in range(_SPLITS):
        split = _split_one(nest)
        if split is None:
            break
        nest = split
    merged: Nest | None = nest
    while merged is not None:
        nest, merged = merged, _merge_one(merged)
    return nest


def _drop_units(nest: Nest) -> Nest:
    units = {axis.variable: constant(0) for axis in (*nest.axes, *nest.folded) if axis.extent == 1}
    nest = nest.map(lambda expression: substitute(expression, units))
    nest = replace(
        nest,
        axes=tuple(axis for axis in nest.axes if axis.extent != 1),
        folded=tuple(axis for axis in nest.folded if axis.extent != 1),
    )
    return nest if nest.folded else _without_fold(nest)


def _without_fold(nest: Nest) -> Nest:
    """A fold over single values as the plain store that it is."""
    value = nest.value
    if nest.epilogue:
        value = substitute(nest.epilogue[1], {nest.epilogue[0]: value})
    return replace(nest, value=value, combine=None, start=None, epilogue=None)


def _split_one(nest: Nest) -> Nest | None:
    """Split an axis that occurs as ``axis // c`` or ``axis % c``."""
    by_variable = {axis.variable: axis for axis in (*nest.axes, *nest.folded)}
    found: list[tuple[Axis, int]] = []

    def visit(node: Any) -> None:
        axis = by_variable.get(node.a) if isinstance(node.a, tirx.Var) else None
        if axis and isinstance(node.b, tirx.IntImm) and axis.extent % int(node.b.value) == 0:
            found.append((axis, int(node.b.value)))

    for expression in nest.expressions():
        for kind in (tirx.FloorDiv, tirx.FloorMod):
            tvm_ffi.structural_walk(expression, (kind, visit))
    found = [(axis, size) for axis, size in found if 1 < size < axis.extent]
    if not found:
        return None
    axis, size = min(found, key=lambda pair: pair[1])
    outer, inner = new_axis("o", axis.extent // size), new_axis("i", size)
    joined = outer.variable * constant(size) + inner.variable
    return nest.replaced([axis], [outer, inner], {axis.variable: joined})


def _merge_one(nest: Nest) -> Nest | None:
    """Merge two neighbouring axes that every access runs through in one stride."""
    free = _variables_outside_indices(nest)
    accesses = nest.accesses()
    for axes in (nest.axes, nest.folded):
        for left, right in itertools.pairwise(axes):
            if left.variable in free or right.variable in free:
                continue
            if _one_stride(accesses, left, right):
                return _merged(nest, left, right)
    return None


def _one_stride(accesses: Sequence[Expr], left: Axis, right: Axis) -> bool:
    for access in accesses:
        factors = coefficients(access, [left, right])
        if factors is None or factors[0] != factors[1] * right.extent:
            return False
    return True


def _merged(nest: Nest, left: Axis, right: Axis) -> Nest:
    joined = new_axis("f", left.extent * right.extent)
    values = {
        left.variable: tirx.floordiv(joined.variable, constant(right.extent)),
        right.variable: tirx.floormod(joined.variable, constant(right.extent)),
    }
    return nest.replaced([left, right], [joined], values)


def _variables_outside_indices(nest: Nest) -> set[Any]:
    """Variables that values use other than to load."""
    found: set[Any] = set()
    for expression in nest.expressions()[1:]:
        found |= variables(map_loads(expression, lambda load: tirx.const(0, str(load.ty.dtype))))
    return found


def segments(nest: Nest) -> Iterator[Nest]:
    """The nest cut along its innermost axis wherever a condition on that axis changes.

    Conditions that differ between the lanes of a vector would make it scalar code.
    """
    cuts = _cuts(nest, nest.axes[-1]) if nest.axes else []
    if not cuts or len(cuts) >= _SEGMENTS:
        yield nest
        return
    axis = nest.axes[-1]
    for begin, end in zip([0, *cuts], [*cuts, axis.extent], strict=True):
        part = new_axis("s", end - begin)
        yield nest.replaced([axis], [part], {axis.variable: part.variable + constant(begin)})


def _cuts(nest: Nest, axis: Axis) -> list[int]:
    found: set[int] = set()

    def visit(node: Any) -> None:
        cut = _changes_at(node, axis)
        if cut is not None:
            found.add(cut)

    for expression in nest.expressions()[1:]:
        for kind in _COMPARISONS:
            tvm_ffi.structural_walk(expression, (kind, visit))
    return sorted(found)


def _changes_at(node: Any, axis: Axis) -> int | None:
    """The first step of the axis at which a comparison differs from its value at step 0."""
    if str(node.a.ty.dtype) != "int64" or loads(node) or variables(node) != {axis.variable}:
        return None
    difference = analyzer_for([axis]).simplify(node.a - node.b)
    factors = coefficients(difference, [axis])
    if factors is None:
        return None
    base = analyzer_for([axis]).simplify(substitute(difference, {axis.variable: constant(0)}))
    if not isinstance(base, tirx.IntImm):
        return None
    holds = _COMPARISONS[type(node)]
    first = holds(int(base.value))
    low, high = 0, axis.extent
    while high - low > 1:
        middle = (low + high) // 2
        same = holds(int(base.value) + factors[0] * middle) == first
        low, high = (middle, high) if same else (low, middle)
    return high if high < axis.extent else None
