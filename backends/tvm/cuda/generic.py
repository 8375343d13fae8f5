"""Kernels of regions without a template: a thread for every element, or for every item."""

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import ir, tirx

from shohin.backends.tvm.generic.bodies import fold_body, store_body
from shohin.backends.tvm.generic.elementary import expand
from shohin.backends.tvm.generic.expressions import (
    INDEX,
    Buffer,
    Expr,
    Stmt,
    buffers,
    constant,
    dtype_of,
    loads,
    substitute,
)
from shohin.backends.tvm.generic.nests import Nest
from shohin.backends.tvm.generic.region import KernelForm
from shohin.backends.tvm.generic.schedule import RangedKernel
from shohin.backends.tvm.generic.stages import LoopStage

THREADS = 128
"""Of a block."""


def build_nest(nest: Nest) -> RangedKernel:
    """The kernel of a nest; its extent is blocks of threads."""
    work = nest.work()
    nest = nest.map(expand)
    count = 1
    for axis in nest.axes:
        count *= axis.extent
    item = tirx.Var("item", "int32")
    rest: Expr = tirx.Cast(INDEX, item)
    values: dict[Any, Expr] = {}
    for axis in reversed(nest.axes):
        values[axis.variable] = tirx.floormod(rest, constant(axis.extent))
        rest = tirx.floordiv(rest, constant(axis.extent))
    body = fold_body(nest, None, 1) if nest.combine else store_body(nest, None)
    arrays = {load.source.name: load.source for load in loads(*nest.expressions())}
    arrays[nest.target.name] = nest.target
    function, blocks = _grid(item, substitute(body, values), list(arrays.values()), count)
    return RangedKernel(function, tuple(arrays), blocks, int(work * count), nest.label)


def build_loops(stage: LoopStage, flat: Mapping[str, Buffer]) -> RangedKernel:
    """The kernel of loops that are run as they are: a thread for every item."""
    item = tirx.Var("item", "int32")
    body = stage.body
    if stage.item is not None:
        index = tirx.Cast(dtype_of(stage.item.variable), item)
        body = substitute(body, {stage.item.variable: index})
    names = tuple(sorted(buffers(body) & set(flat)))
    function, blocks = _grid(item, body, [flat[name] for name in names], stage.extent)
    return RangedKernel(function, names, blocks, stage.extent * 1000, stage.label)


GRIDS = KernelForm(build_nest, build_loops, cut=False)


def _grid(item: Expr, body: Stmt, parameters: Sequence[Buffer], count: int) -> tuple[Any, int]:
    """A function whose threads each run the body for an item, and its blocks."""
    blocks = max(1, -(-count // THREADS))
    block, thread = tirx.Var("block", "int32"), tirx.Var("thread", "int32")
    body = substitute(body, {item: block * THREADS + thread})
    if count % THREADS or not count:
        body = tirx.IfThenElse(block * THREADS + thread < count, body, None)
    for variable, tag, extent in (
        (thread, "threadIdx.x", THREADS),
        (block, "blockIdx.x", blocks),
    ):
        bounds = ir.Range(0, extent)
        axis = tirx.IterVar(bounds, variable, tirx.IterVar.ThreadIndex, tag)
        body = tirx.AttrStmt(axis, "thread_extent", tirx.const(extent, "int32"), body)
    function = tirx.PrimFunc([*parameters], body)
    return function.with_attr({"tirx.noalias": True, "s_tir": True}), blocks
