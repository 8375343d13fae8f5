"""A legalised region as a list of stages over named arrays.

TVM's legaliser gives one PrimFunc per operator, each a few loop nests around single stores. Every
nest becomes a stage of our own: axes, target, value. Stages see arrays in their own shape; plain
reshapes are no stages but other views of the same array.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import ir, relax, s_tir, tirx

from shohin.backends.tvm.generic.expressions import (
    Axis,
    Buffer,
    Expr,
    RefusedError,
    Stmt,
    analyzer_for,
    buffers,
    dtype_of,
    int_of,
    linear,
    new_axis,
    shape_of,
    spread,
    substitute,
)

_COMBINES = (tirx.Add, tirx.Mul, tirx.Max, tirx.Min, tirx.And, tirx.Or)


@dataclass(frozen=True)
class Reduction:
    """How a stage folds its values: ``x = combine(x, value)`` over the axes, from `start`."""

    axes: tuple[Axis, ...]
    combine: type
    start: Expr


@dataclass(frozen=True)
class Stage:
    """``target[indices] = value`` over axes, or a reduction of values.

    Attributes:
        axes: independent loops, outermost first.
        target: the array written.
        indices: where, one index per axis of the array.
        value: what; for a reduction, what is folded.
        reduction: the fold, if any.
        epilogue: what is done to the result of the fold: its variable, and the value stored.
        label: where it comes from, for people.
    """

    axes: tuple[Axis, ...]
    target: Buffer
    indices: tuple[Expr, ...]
    value: Expr
    reduction: Reduction | None = None
    epilogue: tuple[Expr, Expr] | None = None
    label: str = "stage"

    def expressions(self) -> tuple[Expr, ...]:
        """Every expression that may load."""
        return (self.value, self.epilogue[1]) if self.epilogue else (self.value,)

    def all_axes(self) -> tuple[Axis, ...]:
        """Independent axes, then the reduced ones."""
        return self.axes + (self.reduction.axes if self.reduction else ())

    def writes_whole_array_in_order(self) -> bool:
        """Whether the target's indices are just the axes, over its full extent."""
        pairs = zip(self.indices, shape_of(self.target), strict=True)
        wanted = [(index, extent) for index, extent in pairs if extent != 1]
        loops = [axis for axis in self.axes if axis.extent != 1]
        return len(wanted) == len(loops) and all(
            index.same_as(axis.variable) and extent == axis.extent
            for (index, extent), axis in zip(wanted, loops, strict=True)
        )


@dataclass(frozen=True)
class LoopStage:
    """Loops that fit no form of ours, run as they are.

    Attributes:
        body: the statement of one work item.
        item: the variable of the work item, where items are independent.
        extent: how many items there are.
        label: where it comes from, for people.
    """

    body: Stmt
    item: Axis | None
    label: str = "loops"

    @property
    def extent(self) -> int:
        """Number of work items."""
        return self.item.extent if self.item else 1


@dataclass
class Storage:
    """The arrays of a region.

    Attributes:
        arrays: buffers by name, views of other arrays included.
        views: name of the array that a view shows.
        constants: values by name.
    """

    arrays: dict[str, Buffer] = field(default_factory=dict)
    views: dict[str, str] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def new(self, name: str, shape: Sequence[int], dtype: str) -> Buffer:
        """Add an array."""
        self.arrays[name] = tirx.decl_buffer(tuple(shape), dtype, name=name)
        return self.arrays[name]

    def temporary(self, like: Buffer) -> Buffer:
        """Add an array shaped like another."""
        return self.new(f"t{len(self.arrays)}", shape_of(like), str(like.dtype))

    def root(self, name: str) -> str:
        """The array that a name shows in the end."""
        while name in self.views:
            name = self.views[name]
        return name

    def root_buffer(self, buffer: Buffer) -> Buffer:
        """The array that a buffer shows in the end."""
        return self.arrays[self.root(buffer.name)]


def is_reshape(stage: Stage) -> Any | None:
    """The load of a stage that copies an array of the same size in order, else None."""
    load = stage.value
    if stage.reduction or not isinstance(load, ir.TensorLoad):
        return None
    shape, target = shape_of(load.source), shape_of(stage.target)
    if np.prod(shape, dtype=np.int64) != np.prod(target, dtype=np.int64) or 0 in shape:
        return None
    analyzer = analyzer_for(stage.axes)
    same = analyzer.can_prove_equal(linear(load.indices, shape), linear(stage.indices, target))
    return load if same and not buffers(*load.indices) else None


class RegionReader:
    """Reads the stages out of a legalised Relax function."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.storage = Storage()
        self.stages: list[Stage | LoopStage] = []
        self._values: dict[Any, Any] = {}

    def read(self) -> tuple[str, ...]:
        """Read ``main``; gives the names of the arrays that it returns."""
        main = self.module["main"]
        for position, parameter in enumerate(main.params):
            shape = tuple(int_of(extent) for extent in parameter.ty.shape.values)
            self._values[parameter] = self.storage.new(
                f"in{position}", shape, str(parameter.ty.dtype)
            )
        for block in main.body.blocks:
            for binding in block.bindings:
                self._values[binding.var] = self._evaluate(binding.value)
        return tuple(buffer.name for buffer in _flatten(self._evaluate(main.body.body)))

    def _evaluate(self, value: Any) -> Any:
        if isinstance(value, tirx.Var):
            return self._values[value]
        if isinstance(value, ir.GenericConst):
            return self._constant(value)
        if isinstance(value, relax.Tuple):
            return tuple(self._evaluate(item) for item in value.fields)
        if isinstance(value, relax.TupleGetItem):
            return self._evaluate(value.tuple_value)[value.index]
        if isinstance(value, ir.Call) and getattr(value.op, "name", "") == "relax.call_tir":
            return self._call(value)
        raise RefusedError(f"no lowering for {_name_of(value).removeprefix('relax.')}")

    def _constant(self, value: Any) -> Buffer:
        array = value.data.numpy() if hasattr(value, "data") else value.value.numpy()
        name = f"const{len(self.storage.constants)}"
        self.storage.constants[name] = array
        return self.storage.new(name, array.shape, str(array.dtype))

    def _call(self, call: Any) -> Any:
        if len(call.args) > 2:
            raise RefusedError("shapes that are known only at run time")
        function = self.module[call.args[0]]
        arguments = _flatten(self._evaluate(call.args[1]))
        parameters = list(function.params)
        results = [self.storage.temporary(p) for p in parameters[len(arguments) :]]
        bound = dict(zip(parameters, [*arguments, *results], strict=True))
        for stage in _stages_of(function, bound, self.storage, call.args[0].name_hint):
            self._add(stage)
        return results[0] if len(results) == 1 else tuple(results)

    def _add(self, stage: Stage | LoopStage) -> None:
        load = is_reshape(stage) if isinstance(stage, Stage) else None
        if load is None or not isinstance(stage, Stage):
            self.stages.append(stage)
        else:
            self.storage.views[stage.target.name] = load.source.name


def _name_of(value: Any) -> str:
    return str(getattr(getattr(value, "op", value), "name", type(value).__name__))


def _flatten(value: Any) -> list[Any]:
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in _flatten(item)]
    return [value]


def _stages_of(
    function: Any, bound: dict[Any, Buffer], storage: Storage, label: str
) -> Iterator[Stage | LoopStage]:
    body = _unwrap_root(function.body, bound, storage)
    for nest in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        stage = _read_nest(substitute(nest, bound), label)
        if stage is not None:
            yield stage
        else:
            yield from _read_loops(substitute(nest, bound), storage, label)


def _unwrap_root(body: Stmt, bound: dict[Any, Buffer], storage: Storage) -> Stmt:
    """The statements inside the root block; its allocations become temporaries."""
    if not isinstance(body, s_tir.SBlockRealize) or body.block.iter_vars:
        return body
    for allocated in body.block.alloc_buffers:
        bound[allocated] = storage.temporary(allocated)
    return body.block.body


def _read_nest(nest: Stmt, label: str) -> Stage | None:
    """A loop nest around one store as a stage, where it has that form."""
    while isinstance(nest, tirx.For) and nest.kind == tirx.ForKind.SERIAL:
        nest = nest.body
    if not isinstance(nest, s_tir.SBlockRealize):
        return None
    block = nest.block
    store = block.body
    if not isinstance(store, tirx.BufferStore) or block.alloc_buffers or block.match_buffers:
        return None
    if not all(isinstance(value, tirx.Var | tirx.IntImm) for value in nest.iter_values):
        return None
    stage = Stage(
        _axes(block, tirx.IterVar.DataPar), store.buffer, tuple(store.indices), store.value,
        label=label,
    )  # fmt: skip
    folded = _axes(block, tirx.IterVar.CommReduce)
    if len(stage.axes) + len(folded) != len(block.iter_vars):
        return None
    return _fold(stage, folded, block.init) if folded else stage


def _axes(block: Any, kind: int) -> tuple[Axis, ...]:
    return tuple(
        Axis(item.var, int_of(item.dom.extent))
        for item in block.iter_vars
        if item.iter_type == kind
    )


def _fold(stage: Stage, axes: tuple[Axis, ...], init: Stmt) -> Stage | None:
    """The stage as a reduction, where its update is one that can be reordered."""
    value = stage.value
    if not isinstance(value, _COMBINES) or not isinstance(init, tirx.BufferStore):
        return None
    sides = [value.a, value.b]
    own = [i for i, side in enumerate(sides) if _is_load_of(side, stage)]
    if len(own) != 1:
        return None
    operand = sides[1 - own[0]]
    return replace(stage, value=operand, reduction=Reduction(axes, type(value), init.value))


def _is_load_of(side: Expr, stage: Stage) -> bool:
    return (
        isinstance(side, ir.TensorLoad)
        and side.source.same_as(stage.target)
        and tvm_ffi.structural_equal(list(side.indices), list(stage.indices))
    )


def _read_loops(nest: Stmt, storage: Storage, label: str) -> Iterator[LoopStage]:
    """Any other statement as loops; a parallel loop outermost gives the work items."""
    bound: dict[Any, Buffer] = {}

    def lower(realize: Any) -> Stmt:
        block = realize.block
        for allocated in block.alloc_buffers:
            bound[allocated] = storage.temporary(allocated)
        values = {i.var: v for i, v in zip(block.iter_vars, realize.iter_values, strict=True)}
        body = substitute(block.body, values)
        if block.init is None:
            return body
        first = [
            value == tirx.const(0, dtype_of(value))
            for item, value in zip(block.iter_vars, realize.iter_values, strict=True)
            if item.iter_type == tirx.IterVar.CommReduce
        ]
        start = tirx.IfThenElse(tirx.all(*first), substitute(block.init, values), None)
        return tirx.SeqStmt([start, body])

    independent = _independent_loops(nest)
    body = tvm_ffi.structural_map(nest, (s_tir.SBlockRealize, lower), order="post")
    body = substitute(body, bound)
    if independent:
        yield _fuse_loops(body, independent, label)
        return
    while isinstance(body, tirx.AttrStmt):
        body = body.body
    for part in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        yield _loop_stage(part, label)


def _independent_loops(nest: Stmt) -> int:
    """How many of the outermost loops run through elements that one block stores apart."""
    variables = []
    while isinstance(nest, tirx.For):
        variables.append(nest.loop_var)
        nest = nest.body
    if not isinstance(nest, s_tir.SBlockRealize):
        return 0
    apart = {
        value
        for item, value in zip(nest.block.iter_vars, nest.iter_values, strict=True)
        if item.iter_type == tirx.IterVar.DataPar and isinstance(value, tirx.Var)
    }
    count = 0
    while count < len(variables) and variables[count] in apart:
        count += 1
    return count


def _fuse_loops(nest: Stmt, count: int, label: str) -> LoopStage:
    """The outermost loops as the work items of the rest."""
    axes = []
    for _ in range(count):
        axes.append(Axis(nest.loop_var, int_of(nest.extent)))
        nest = nest.body
    item = new_axis("item", math.prod(axis.extent for axis in axes))
    indices = spread(item.variable, [axis.extent for axis in axes])
    values = {
        axis.variable: tirx.Cast(dtype_of(axis.variable), index)
        for axis, index in zip(axes, indices, strict=True)
    }
    return LoopStage(_sequential(substitute(nest, values)), item, label)


def _loop_stage(part: Stmt, label: str) -> LoopStage:
    if isinstance(part, tirx.For) and part.kind == tirx.ForKind.PARALLEL:
        item = Axis(part.loop_var, int_of(part.extent))
        return LoopStage(_sequential(part.body), item, label)
    return LoopStage(_sequential(part), None, label)


def _sequential(body: Stmt) -> Stmt:
    def serial(loop: Any) -> Stmt:
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    return tvm_ffi.structural_map(body, (tirx.For, serial), order="post")
