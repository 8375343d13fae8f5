"""From nests to ranged, vectorised kernels.

Every nest becomes a function of its own over independent work items. The innermost axis runs in
vectors where its elements are stored side by side; a fold over neighbouring elements runs in
lanes that are combined at the end. An uneven end is done by a last vector that overlaps the one
before it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from shohin.backends.tvm.generic.bodies import fold_body, loop, store_body
from shohin.backends.tvm.generic.elementary import expand
from shohin.backends.tvm.generic.expressions import (
    INDEX,
    Axis,
    Buffer,
    Expr,
    Stmt,
    arithmetic_cost,
    buffers,
    coefficients,
    constant,
    dtype_of,
    loads,
    new_axis,
    substitute,
)
from shohin.backends.tvm.generic.nests import Nest
from shohin.backends.tvm.generic.stages import LoopStage
from shohin.backends.tvm.generic.workload import Workload

_ITEMS = 64
_SMALLEST_ITEM = 1024
_LARGEST_ITEM = 1 << 17
_REGISTER = 16
_WIDE_FOLD = 64
_ROUNDS = 4
_CHEAP = 4.0


@dataclass(frozen=True)
class RangedFunction:
    """A function over ``[begin, end)``.

    Attributes:
        function: PrimFunc; its arrays, then int32 begin and end.
        extent: number of independent work items.
    """

    function: Any
    extent: int


@dataclass(frozen=True)
class RangedKernel:
    """A kernel over a range of work items.

    Attributes:
        function: PrimFunc; buffers in the order of `arguments`, then begin and end.
        arguments: names of its arrays.
        extent: number of work items.
        operations: rough scalar operations of all items.
        label: where it comes from, for people.
        workload: what it computes in the form that schedules are searched for, where it has one.
    """

    function: Any
    arguments: tuple[str, ...]
    extent: int
    operations: int
    label: str
    workload: Workload | None = None


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


@dataclass(frozen=True)
class Widths:
    """Vector widths of a nest: along its innermost axis, and along its innermost fold."""

    lanes: int
    fold_lanes: int


def choose_widths(nest: Nest) -> Widths:
    """Vectors run where results lie side by side, else where folded values do."""
    dtypes = [str(nest.target.dtype), dtype_of(nest.value)]
    strides = _strides(nest.accesses(), nest.axes[-1]) if nest.axes else []
    lanes = _lanes(nest.axes[-1].extent, dtypes) if strides and strides[0] == 1 else 1
    if nest.combine is None:
        return Widths(lanes, 1)
    if "bool" in dtypes:
        return Widths(1, 1)
    if lanes > 1 and all(stride in (0, 1) for stride in strides):
        return Widths(_widened(nest, lanes, nest.axes[-1].extent), 1)
    axis = nest.folded[-1]
    folded = _strides([load.indices[0] for load in loads(nest.value)], axis)
    fold_lanes = _lanes(axis.extent, dtypes)
    if fold_lanes > 1 and 1 in folded and all(stride in (0, 1) for stride in folded):
        return Widths(1, _widened(nest, fold_lanes, axis.extent // _ROUNDS))
    return Widths(lanes, 1)


def _widened(nest: Nest, lanes: int, extent: int) -> int:
    """Several registers at a time where the folded value is cheap, to hide the fold's latency."""
    cheap = arithmetic_cost(nest.value) <= _CHEAP
    return _WIDE_FOLD if cheap and lanes == _REGISTER and extent >= _WIDE_FOLD else lanes


def _strides(accesses: Sequence[Expr], axis: Axis) -> list[int | None]:
    """Stride of every access along an axis, None where it has none."""
    found = [coefficients(access, [axis]) for access in accesses]
    return [factors[0] if factors else None for factors in found]


def _lanes(extent: int, dtypes: Sequence[str]) -> int:
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
    widths = choose_widths(nest)
    work = nest.work()
    nest = nest.map(expand)
    plan = make_plan(nest.axes, work, widths.lanes)
    item = tirx.Var("item", "int32")
    body = _item_body(nest, plan, widths, tirx.Cast(INDEX, item))
    arrays = {load.source.name: load.source for load in loads(*nest.expressions())}
    arrays[nest.target.name] = nest.target
    function = ranged(item, body, list(arrays.values()))
    operations = int(work * math.prod(axis.extent for axis in nest.axes))
    return RangedKernel(function, tuple(arrays), plan.extent, operations, nest.label)


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
    function = ranged(item, body, [flat[name] for name in names])
    return RangedKernel(function, names, stage.extent, stage.extent * 1000, stage.label)


def ranged(item: Expr, body: Stmt, parameters: Sequence[Buffer]) -> Any:
    """A function that runs the body for every item of a range.

    Args:
        item: the variable of the work item in the body.
        body: what is done for one item.
        parameters: its arrays; begin and end come behind them.
    """
    begin, end = tirx.Var("begin", "int32"), tirx.Var("end", "int32")
    shifted = substitute(body, {item: item + begin})
    body = tirx.For(item, tirx.const(0, "int32"), end - begin, tirx.ForKind.SERIAL, shifted)
    function = tirx.PrimFunc([*parameters, begin, end], body)
    return function.with_attr({"tirx.noalias": True, "s_tir": True})


def _item_body(nest: Nest, plan: Plan, widths: Widths, item: Expr) -> Stmt:
    """One work item: the outer axes from its number, loops over the rest."""
    values: dict[Any, Expr] = {}
    low = constant(0)
    if plan.chunked is not None:
        low = tirx.floormod(item, constant(plan.chunks)) * constant(plan.chunk)
        item = tirx.floordiv(item, constant(plan.chunks))
    for axis in reversed(plan.outer):
        values[axis.variable] = tirx.floormod(item, constant(axis.extent))
        item = tirx.floordiv(item, constant(axis.extent))
    body = _step_body(nest, widths)
    for axis in reversed(plan.inner):
        body = _axis_loop(axis, widths.lanes if axis is nest.axes[-1] else 1, body)
    if plan.chunked is not None:
        step = widths.lanes if plan.chunked is nest.axes[-1] else 1
        body = _axis_loop(plan.chunked, step, body, low, plan.chunk)
    return substitute(body, values)


def _step_body(nest: Nest, widths: Widths) -> Stmt:
    """One step of the innermost axis: its variable is the first of the step's lanes."""
    lane = None
    if widths.lanes > 1:
        lane = new_axis("lane", widths.lanes)
        first = nest.axes[-1].variable
        shifted = {first: first + lane.variable}
        nest = nest.map(lambda expression: substitute(expression, shifted))
    return fold_body(nest, lane, widths.fold_lanes) if nest.combine else store_body(nest, lane)


def _axis_loop(axis: Axis, step: int, body: Stmt, low: Expr | None = None, chunk: int = 0) -> Stmt:
    """The body for an axis or a chunk of it, in vectors where there are lanes.

    The last vector is moved back to end with the axis, over elements that are done already.
    """
    chunk = chunk or axis.extent
    count: Expr = constant(-(-chunk // step))
    if low is not None and axis.extent % chunk:
        left = tirx.floordiv(constant(axis.extent + step - 1) - low, constant(step))
        count = tirx.Min(count, left)
    counter = tirx.Var("v", INDEX)
    start = counter * constant(step) + (constant(0) if low is None else low)
    if axis.extent % step:
        start = tirx.Min(start, constant(axis.extent - step))
    return loop(counter, count, substitute(body, {axis.variable: start}))
