"""Reductions in the form that schedules are searched for: blocks over arrays of several axes.

Our own rules take the loops of a stage as they like; TVM's scheduling wants them as blocks that
say what they read and write. Both forms compute the same from the same arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import ir, s_tir, tirx

from shohin.backends.tvm.generic.expressions import (
    INDEX,
    Axis,
    Buffer,
    Expr,
    Stmt,
    analyzer_for,
    constant,
    dtype_of,
    loads,
    map_loads,
    new_axis,
    shape_of,
    substitute,
)
from shohin.backends.tvm.generic.stages import Stage, Storage

_COMBINES = (tirx.Add, tirx.Mul, tirx.Max, tirx.Min)


@dataclass(frozen=True)
class Workload:
    """A reduction, maybe with an epilogue, whose results each lie at a place of their own.

    Attributes:
        stage: the reduction; no axis has extent one, every index of its target is an axis or 0.
        buffers: the arrays that it reads, then the one that it writes.
        arguments: their names.
    """

    stage: Stage
    buffers: tuple[Buffer, ...]
    arguments: tuple[str, ...]

    def renamed(self, name: Callable[[str], str]) -> "Workload":
        """The same with other names of its arrays."""
        return replace(self, arguments=tuple(name(argument) for argument in self.arguments))

    def function(self) -> Any:
        """The PrimFunc to schedule; equal workloads give equal text, whatever their arrays' names.

        Its parameters are `buffers`, in their order.
        """
        names = [f"a{i}" for i in range(len(self.buffers) - 1)] + ["y"]
        parameters = {
            buffer: tirx.decl_buffer(_wide(shape_of(buffer)), str(buffer.dtype), name=name)
            for buffer, name in zip(self.buffers, names, strict=True)
        }
        function = tirx.PrimFunc(list(parameters.values()), _body(_over(self.stage, parameters)))
        return function.with_attr({"global_symbol": "main", "tirx.noalias": True, "s_tir": True})


def find_workload(stage: Stage, storage: Storage) -> Workload | None:
    """The stage as a workload, None where it has not that form.

    Args:
        stage: a stage.
        storage: its arrays.
    """
    stage = _without_units(stage)
    if stage.reduction is None or not issubclass(stage.reduction.combine, _COMBINES):
        return None
    if not stage.axes or not _places_are_axes(stage):
        return None
    found = loads(*stage.expressions())
    if any(loads(*load.indices) for load in found):
        return None
    buffers = list(dict.fromkeys(load.source for load in found))
    names = [storage.root(buffer.name) for buffer in (*buffers, stage.target)]
    types = {dtype_of(stage.value), str(stage.target.dtype), *(str(b.dtype) for b in buffers)}
    # Vectors of bool come out wrong; our own rules know that, MetaSchedule does not.
    if names[-1] in names[:-1] or "bool" in types:
        return None
    return Workload(stage, (*buffers, stage.target), tuple(names))


def _without_units(stage: Stage) -> Stage:
    """The stage with axes of extent one at their only place, and simplified."""
    units = {axis.variable: constant(0) for axis in stage.all_axes() if axis.extent == 1}
    simplify = analyzer_for(stage.all_axes()).simplify
    reduction = stage.reduction
    if reduction:
        folded = tuple(axis for axis in reduction.axes if axis.extent != 1)
        reduction = replace(reduction, axes=folded) if folded else None
    return replace(
        _mapped(stage, lambda expression: simplify(substitute(expression, units))),
        axes=tuple(axis for axis in stage.axes if axis.extent != 1),
        reduction=reduction,
    )


def _mapped(stage: Stage, change: Callable[[Expr], Expr]) -> Stage:
    """The stage with every expression changed."""
    epilogue = stage.epilogue and (stage.epilogue[0], change(stage.epilogue[1]))
    indices = tuple(change(index) for index in stage.indices)
    return replace(stage, indices=indices, value=change(stage.value), epilogue=epilogue)


def _places_are_axes(stage: Stage) -> bool:
    variables = [index for index in stage.indices if not isinstance(index, tirx.IntImm)]
    return len(variables) == len(stage.axes) and {axis.variable for axis in stage.axes} == set(
        variables
    )


def _over(stage: Stage, arrays: Mapping[Any, Buffer]) -> Stage:
    """The stage over the same arrays without their axes of extent one."""

    def load_from(load: Any) -> Expr:
        indices = _at_wide(load.indices, shape_of(load.source))
        return tirx.BufferLoad(arrays[load.source], indices)

    indices = tuple(_at_wide(stage.indices, shape_of(stage.target)))
    stage = _mapped(stage, lambda expression: map_loads(expression, load_from))
    return replace(stage, target=arrays[stage.target], indices=indices)


def _wide(shape: Sequence[int]) -> list[int]:
    return [extent for extent in shape if extent != 1] or [1]


def _at_wide(indices: Sequence[Expr], shape: Sequence[int]) -> list[Expr]:
    """The indices of the axes that are not of extent one."""
    kept = [index for index, extent in zip(indices, shape, strict=True) if extent != 1]
    return kept or [constant(0)]


def _body(stage: Stage) -> Stmt:
    """The blocks inside a root block, which holds the sums where an epilogue follows."""
    places = [axis.variable for axis in stage.axes]
    if stage.epilogue is None:
        blocks, totals = [_reduction(stage, stage.target, list(stage.indices))], []
    else:
        shape = [axis.extent for axis in stage.axes]
        total = tirx.decl_buffer(shape, dtype_of(stage.value), name="total")
        variable, value = stage.epilogue
        value = substitute(value, {variable: tirx.BufferLoad(total, places)})
        store = tirx.BufferStore(stage.target, value, list(stage.indices))
        blocks = [_reduction(stage, total, places), _block("finish", stage.axes, (), store)]
        totals = [total]
    body = tirx.SeqStmt(blocks) if len(blocks) > 1 else blocks[0]
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=totals)
    return s_tir.SBlockRealize([], True, root)


def _reduction(stage: Stage, target: Buffer, indices: list[Expr]) -> Stmt:
    if stage.reduction is None:
        raise ValueError("expected a reduction")
    update = stage.reduction.combine(tirx.BufferLoad(target, indices), stage.value)
    return _block(
        "reduce", stage.axes, stage.reduction.axes,
        tirx.BufferStore(target, update, indices),
        tirx.BufferStore(target, stage.reduction.start, indices),
    )  # fmt: skip


def _block(
    name: str, axes: Sequence[Axis], folded: Sequence[Axis], store: Any, init: Any = None
) -> Stmt:
    """Loops around a block of one store. Blocks have variables of their own."""
    kinds = [(axis, tirx.IterVar.DataPar) for axis in axes]
    kinds += [(axis, tirx.IterVar.CommReduce) for axis in folded]
    own = {axis.variable: tirx.Var(f"v{i}", INDEX) for i, (axis, _) in enumerate(kinds)}
    variables = [
        tirx.IterVar(ir.Range(constant(0), constant(axis.extent)), own[axis.variable], kind)
        for axis, kind in kinds
    ]
    store, init = substitute(store, own), init and substitute(init, own)
    reads = [
        _region(load.source, load.indices)
        for load in loads(store.value)
        if not load.source.same_as(store.buffer)
    ]
    writes = [_region(store.buffer, store.indices)]
    block = s_tir.SBlock(variables, reads, writes, name, store, init)
    loops = [new_axis(f"i{i}", axis.extent) for i, (axis, _) in enumerate(kinds)]
    body: Stmt = s_tir.SBlockRealize([axis.variable for axis in loops], True, block)
    for axis in reversed(loops):
        body = tirx.For(
            axis.variable, constant(0), constant(axis.extent), tirx.ForKind.SERIAL, body
        )
    return body


def _region(buffer: Buffer, indices: Sequence[Expr]) -> Any:
    return tirx.BufferRegion(
        buffer, [ir.Range.from_min_extent(index, constant(1)) for index in indices]
    )
