"""From nests to ranged, vectorised kernels.

Every nest becomes a function of its own over independent work items. The innermost axis runs in
vectors where its elements are stored side by side; a fold over neighbouring elements runs in
lanes that are combined at the end. An uneven end is done by a last vector that overlaps the one
before it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx

from shohin.backends.tvm.generic.elementary import expand
from shohin.backends.tvm.generic.expressions import (
    Axis,
    Buffer,
    Expr,
    Stmt,
    arithmetic_cost,
    buffers,
    coefficients,
    constant,
    dtype_of,
    new_axis,
    substitute,
)
from shohin.backends.tvm.generic.nests import Nest
from shohin.backends.tvm.generic.stages import LoopStage

_ITEMS = 64
_SMALLEST_ITEM = 1024
_LARGEST_ITEM = 1 << 17
_WIDE_FOLD = 64
_CHEAP = 4.0


@dataclass(frozen=True)
class RangedKernel:
    """A kernel over a range of work items.

    Attributes:
        function: PrimFunc; buffers in the order of `arguments`, then begin and end.
        arguments: names of its arrays.
        extent: number of work items.
        operations: rough scalar operations of all items.
        label: where it comes from, for people.
    """

    function: Any
    arguments: tuple[str, ...]
    extent: int
    operations: int
    label: str


@dataclass(frozen=True)
class Plan:
    """How a nest is cut into work items.

    Attributes:
        outer: axes that items run through.
        chunked: the axis of which an item does a part, if any.
        chunk: how much of it.
        inner: axes that an item runs through as a whole.
    """

    outer: tuple[Axis, ...]
    chunked: Axis | None
    chunk: int
    inner: tuple[Axis, ...]

    @property
    def chunks(self) -> int:
        """How many parts the chunked axis has."""
        return -(-self.chunked.extent // self.chunk) if self.chunked else 1

    @property
    def extent(self) -> int:
        """Number of work items."""
        return math.prod(axis.extent for axis in self.outer) * self.chunks


def lanes_for(extent: int, dtypes: Sequence[str]) -> int:
    """Vector width for so many neighbouring elements; 1 for scalar code."""
    widest = 8 if any(dtype.endswith("64") for dtype in dtypes) else 16
    return next((lanes for lanes in (16, 8, 4) if lanes <= min(extent, widest)), 1)


def make_plan(axes: Sequence[Axis], work: float, lanes: int) -> Plan:
    """Cut loops into work items of a useful size.

    Args:
        axes: the loops.
        work: operations of one step of the innermost.
        lanes: vector width along the innermost.
    """
    total = work * math.prod(axis.extent for axis in axes)
    wanted = min(max(total / _ITEMS, _SMALLEST_ITEM), _LARGEST_ITEM)
    inside = work
    for position in reversed(range(len(axes))):
        axis = axes[position]
        if inside * axis.extent > wanted:
            step = lanes if position == len(axes) - 1 else 1
            chunk = min(-(-int(wanted // inside) // step) * step or step, axis.extent)
            return Plan(tuple(axes[:position]), axis, chunk, tuple(axes[position + 1 :]))
        inside *= axis.extent
    return Plan((), None, 1, tuple(axes))



def build_nest(nest: Nest) -> RangedKernel:
    """The kernel of a nest whose extents are all positive."""
    return _NestBuilder(nest).build()


def build_loops(stage: LoopStage, flat: Mapping[str, Buffer]) -> RangedKernel:
    """The kernel of loops that are run as they are.

    Args:
        stage: loops over flat arrays.
        flat: the arrays by name.
    """
    item = tirx.Var("item", "int32")
    body = stage.body
    if stage.item is not None:
        index = tirx.Cast(dtype_of(stage.item.variable), item)
        body = substitute(body, {stage.item.variable: index})
    names = tuple(sorted(buffers(body) & set(flat)))
    function = _ranged(item, body, [flat[name] for name in names])
    return RangedKernel(function, names, stage.extent, stage.extent * 1000, stage.label)


def _ranged(item: Expr, body: Stmt, parameters: Sequence[Buffer]) -> Any:
    """A function that runs the body for every item of a range."""
    begin, end = tirx.Var("begin", "int32"), tirx.Var("end", "int32")
    shifted = substitute(body, {item: item + begin})
    loop = _loop(Axis(item, end - begin), shifted)
    function = tirx.PrimFunc([*parameters, begin, end], loop)
    return function.with_attr({"tirx.noalias": True, "s_tir": True})


def _loop(axis: Axis, body: Stmt, kind: Any = tirx.ForKind.SERIAL) -> Stmt:
    start = tirx.const(0, dtype_of(axis.variable))
    return tirx.For(axis.variable, start, axis.extent, kind, body)


def _nested(axes: Sequence[Axis], body: Stmt) -> Stmt:
    for axis in reversed(axes):
        body = _loop(axis, body)
    return body


class _NestBuilder:
    """Builds the code of one nest."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest.map(expand)
        self.work = nest.work()
        dtypes = [str(nest.target.dtype), dtype_of(nest.value)]
        innermost = nest.axes[-1] if nest.axes else None
        self.lanes = lanes_for(innermost.extent, dtypes) if innermost and self._fits() else 1
        self.fold_lanes = 1
        if nest.combine is not None and not self._spatial_is_contiguous():
            if self._fold_is_contiguous():
                self.fold_lanes = lanes_for(nest.folded[-1].extent, dtypes)
            if self.fold_lanes > 1:
                self.lanes = 1
        self._widen(innermost)

    def build(self) -> RangedKernel:
        """The whole kernel."""
        nest, axes = self.nest, self.nest.axes
        plan = make_plan(axes, self.work, self.lanes)
        item = tirx.Var("item", "int32")
        body = self._body(plan, tirx.Cast("int64", item))
        names = sorted(buffers(*nest.expressions()) | {nest.target.name})
        arrays = {load.source.name: load.source for load in self._loads()}
        arrays[nest.target.name] = nest.target
        names = [name for name in names if name in arrays]
        function = _ranged(item, body, [arrays[name] for name in names])
        operations = int(self.work * math.prod(axis.extent for axis in axes))
        return RangedKernel(function, tuple(names), plan.extent, operations, nest.label)

    def _loads(self) -> list[Any]:
        return loads(*self.nest.expressions())

    def _factors(self, axis: Axis) -> list[int | None]:
        """Stride along an axis of the store and of every load, None where there is none."""
        return [
            factors[0] if (factors := coefficients(access, [axis])) else None
            for access in self.nest.accesses()
        ]

    def _fits(self) -> bool:
        """Whether the innermost axis is the one along which results are stored side by side."""
        return self._factors(self.nest.axes[-1])[0] == 1

    def _spatial_is_contiguous(self) -> bool:
        if self.lanes == 1:
            return False
        return all(factor in (0, 1) for factor in self._factors(self.nest.axes[-1]))

    def _fold_is_contiguous(self) -> bool:
        if not self.nest.folded:
            return False
        axis = self.nest.folded[-1]
        nest = self.nest
        factors = [coefficients(load.indices[0], [axis]) for load in loads(nest.value)]
        strides = [factor[0] if factor else None for factor in factors]
        return 1 in strides and all(stride in (0, 1) for stride in strides)

    def _widen(self, innermost: Axis | None) -> None:
        """Fold several registers at a time where the value is cheap."""
        if self.nest.combine is None or arithmetic_cost(self.nest.value) > _CHEAP:
            return
        if self.lanes == 16 and innermost and innermost.extent >= _WIDE_FOLD:
            self.lanes = _WIDE_FOLD
        if self.fold_lanes == 16 and self.nest.folded[-1].extent >= 4 * _WIDE_FOLD:
            self.fold_lanes = _WIDE_FOLD

    def _body(self, plan: Plan, item: Expr) -> Stmt:
        """One work item: the outer axes from its number, loops over the rest."""
        values: dict[Any, Expr] = {}
        loops = list(plan.inner)
        rest = item
        if plan.chunked is not None:
            low = tirx.floormod(rest, constant(plan.chunks)) * constant(plan.chunk)
            rest = tirx.floordiv(rest, constant(plan.chunks))
            part = self._part_of_chunk(plan, low)
            values[plan.chunked.variable] = part.variable + low
            loops.insert(0, part)
        for axis in reversed(plan.outer):
            values[axis.variable] = tirx.floormod(rest, constant(axis.extent))
            rest = tirx.floordiv(rest, constant(axis.extent))
        return substitute(self._loops(loops, plan), values)
