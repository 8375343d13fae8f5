"""Compile any region of ATen nodes that TVM's importer takes.

This is the route of operators that have no template: the region is imported and legalised by
TVM, its loops are read back as stages, fused, and built as ranged kernels like the templates'.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import tvm_ffi
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from tvm import ir, tirx

from shohin.backends.tvm.generic.expressions import (
    Buffer,
    Expr,
    RefusedError,
    contains,
    linear,
    map_loads,
    shape_of,
)
from shohin.backends.tvm.generic.importer import Inputs, import_region
from shohin.backends.tvm.generic.inline import fuse
from shohin.backends.tvm.generic.nests import Nest, canonical, flatten, segments
from shohin.backends.tvm.generic.schedule import RangedKernel, build_loops, build_nest
from shohin.backends.tvm.generic.stages import LoopStage, RegionReader, Stage, Storage
from shohin.backends.tvm.generic.workload import Workload, find_workload
from shohin.errors import UnsupportedError

_CACHED_REGIONS = 256
_FORBIDDEN_CALLS = ("call_packed", "call_cpacked", "call_extern", "call_pure_extern")


class RegionError(UnsupportedError):
    """A region cannot be compiled by the generic route."""


@dataclass(frozen=True)
class RegionCall:
    """One call of a kernel.

    Attributes:
        function: PrimFunc; buffers in the order of `arguments`, then int32 begin and end.
        arguments: names of its arrays.
        extent: number of independent work items.
        operations: rough scalar operations of all items, to decide whether threads pay.
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
class RegionCode:
    """A compiled region.

    Arrays are named ``in0``, ``const0``, ``tmp0``, ``out0`` and so on.

    Attributes:
        calls: kernels in the order to call them.
        temporaries: shape and type of every ``tmp`` array.
        constants: every ``const`` array.
        outputs: for each output the name of its array; not its own ``out`` array where it is
            just another one, maybe in another shape.
    """

    calls: tuple[RegionCall, ...]
    temporaries: Mapping[str, tuple[tuple[int, ...], str]]
    constants: Mapping[str, np.ndarray[Any, Any]]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class KernelForm:
    """What kernels are made of a region's stages.

    Attributes:
        nest: the kernel of a nest.
        loops: the kernel of loops that are run as they are, over flat arrays by name.
        cut: whether nests are cut where conditions on their innermost axis change.
    """

    nest: Callable[[Nest], RangedKernel]
    loops: Callable[[LoopStage, Mapping[str, Buffer]], RangedKernel]
    cut: bool


RANGES = KernelForm(build_nest, build_loops, cut=True)
"""Functions over ranges of items, for processors."""


@dataclass(frozen=True)
class _RegionKey:
    """A region by its structure: equal regions share their code."""

    structure: str
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    form: KernelForm
    module: fx.GraphModule = field(compare=False)


def compile_region(module: fx.GraphModule, inputs: Inputs, form: KernelForm = RANGES) -> RegionCode:
    """Compile a region of ATen nodes.

    Args:
        module: nodes with only concrete integer arguments; placeholders in, a tuple of tensors
            out.
        inputs: shape and type of each placeholder.
        form: what kernels are made.

    Raises:
        RegionError: TVM's importer or legaliser does not take the region.
    """
    fixed = tuple((tuple(shape), dtype) for shape, dtype in inputs)
    key = _RegionKey(_structure(module), fixed, form, module)
    if any(node.op == "get_attr" for node in module.graph.nodes):
        return _compile(key)
    return _compile_cached(key)


def _structure(module: fx.GraphModule) -> str:
    """The nodes as text, whatever their names."""
    numbers: dict[fx.Node, str] = {}
    lines = []
    for number, node in enumerate(module.graph.nodes):
        numbers[node] = f"%{number}"
        target = "" if node.op == "placeholder" else str(node.target)
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda source: numbers[source])
        lines.append(f"{node.op} {target} {arguments}")
    return "\n".join(lines)


def unsupported_nodes(module: fx.GraphModule, inputs: Inputs) -> list[tuple[fx.Node, str]]:
    """Each node that the importer or legaliser cannot take, with the reason.

    Args:
        module: a region for which :func:`compile_region` raised.
        inputs: shape and type of each placeholder.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    refused = []
    for node in module.graph.nodes:
        reason = _reason_against(node) if node.op == "call_function" else None
        if reason:
            refused.append((node, reason))
    return refused


def _reason_against(node: fx.Node) -> str | None:
    """Why a node alone cannot be compiled, None if it can."""
    values = [source.meta["val"] for source in node.all_input_nodes]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return None
    graph = fx.Graph()
    copies = {source: graph.placeholder(source.name) for source in node.all_input_nodes}
    copy = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(_tensors(graph, copy, node.meta["val"])))
    module = fx.GraphModule(node.graph.owning_module or torch.nn.Module(), graph)
    try:
        compile_region(module, [(tuple(value.shape), value.dtype) for value in values])
    except RegionError as error:
        return error.problem
    return None


def _tensors(graph: fx.Graph, node: fx.Node, value: Any) -> list[fx.Node]:
    if isinstance(value, torch.Tensor):
        return [node]
    return [
        graph.call_function(operator.getitem, (node, position))
        for position, part in enumerate(value)
        if isinstance(part, torch.Tensor)
    ]


@lru_cache(maxsize=_CACHED_REGIONS)
def _compile_cached(key: _RegionKey) -> RegionCode:
    return _compile(key)


def _compile(key: _RegionKey) -> RegionCode:
    try:
        reader = RegionReader(import_region(key.module, key.inputs))
        outputs = reader.read()
        return _Assembler(reader.storage, outputs, key.form).assemble(reader.stages)
    except RefusedError as error:
        raise _region_error(f"TVM cannot compile it: {error}") from error
    # TVM raises AssertionError, KeyError, TypeError and its own kinds for what it cannot import.
    except Exception as error:
        raise _region_error("TVM has no lowering for it") from error


def _region_error(problem: str) -> RegionError:
    return RegionError("region", problem, "see the error that this one follows")


class _Assembler:
    """Builds the calls of a region and gives its arrays their final names."""

    def __init__(self, storage: Storage, outputs: Sequence[str], form: KernelForm) -> None:
        self.storage = storage
        self.form = form
        self.outputs = [storage.root(name) for name in outputs]
        self.names: dict[str, str] = {}
        for position, name in enumerate(self.outputs):
            if not name.startswith(("in", "const")):
                self.names.setdefault(name, f"out{position}")

    def assemble(self, stages: list[Stage | LoopStage]) -> RegionCode:
        """Fuse the stages and build their kernels."""
        flat = {
            name: tirx.decl_buffer((max(int(np.prod(shape_of(b))), 1),), str(b.dtype), name=name)
            for name, b in self.storage.arrays.items()
            if name not in self.storage.views
        }
        kernels = [
            kernel
            for stage in fuse(stages, self.storage, set(self.outputs))
            for kernel in _kernels(stage, self.storage, flat, self.form)
        ]
        calls = tuple(self._call(kernel) for kernel in kernels)
        used = {name for kernel in kernels for name in _arrays_of(kernel)} | set(self.outputs)
        return RegionCode(
            calls,
            {self.names[name]: self._description(name) for name in self.names
             if self.names[name].startswith("tmp")},
            {name: value for name, value in self.storage.constants.items() if name in used},
            tuple(self._final(name) for name in self.outputs),
        )  # fmt: skip

    def _call(self, kernel: RangedKernel) -> RegionCall:
        arguments = tuple(self._final(name) for name in kernel.arguments)
        workload = kernel.workload and kernel.workload.renamed(self._final)
        return RegionCall(
            kernel.function, arguments, kernel.extent, kernel.operations, kernel.label, workload
        )

    def _final(self, name: str) -> str:
        if name.startswith(("in", "const")):
            return name
        temporaries = sum(final.startswith("tmp") for final in self.names.values())
        return self.names.setdefault(name, f"tmp{temporaries}")

    def _description(self, name: str) -> tuple[tuple[int, ...], str]:
        buffer = self.storage.arrays[name]
        return shape_of(buffer), str(buffer.dtype)


def _kernels(
    stage: Stage | LoopStage, storage: Storage, flat: Mapping[str, Buffer], form: KernelForm
) -> list[RangedKernel]:
    if isinstance(stage, LoopStage):
        _refuse_runtime_calls(stage.body)
        if contains(stage.body, tirx.AllocBuffer):
            raise RefusedError("it needs scratch memory from TVM's runtime")
        return [form.loops(_flatten_loops(stage, storage, flat), flat)]
    if any(axis.extent == 0 for axis in stage.axes):
        return []
    for expression in stage.expressions():
        _refuse_runtime_calls(expression)
    nest = canonical(flatten(stage, storage, flat))
    parts = segments(nest) if form.cut else [nest]
    kernels = [form.nest(canonical(part)) for part in parts]
    if len(kernels) == 1 and nest.combine:
        return [replace(kernels[0], workload=find_workload(stage, storage))]
    return kernels


def _arrays_of(kernel: RangedKernel) -> tuple[str, ...]:
    """Names of all arrays that a kernel or its searched replacement takes."""
    return kernel.arguments + (kernel.workload.arguments if kernel.workload else ())


def _refuse_runtime_calls(body: Any) -> None:
    def visit(call: Any) -> None:
        if str(getattr(call.op, "name", "")).endswith(_FORBIDDEN_CALLS):
            raise RefusedError(f"it needs TVM's runtime: {call.args[0]}")

    tvm_ffi.structural_walk(body, (ir.Call, visit))


def _flatten_loops(stage: LoopStage, storage: Storage, flat: Mapping[str, Buffer]) -> LoopStage:
    def flatten_load(load: Any) -> Expr:
        root = storage.root(load.source.name)
        place = linear(load.indices, shape_of(load.source))
        return tirx.BufferLoad(flat[root], [place]) if root in flat else load

    def flatten_store(store: Any) -> Any:
        root = storage.root(store.buffer.name)
        place = linear(store.indices, shape_of(store.buffer))
        return tirx.BufferStore(flat[root], store.value, [place]) if root in flat else store

    body = map_loads(stage.body, flatten_load)
    body = tvm_ffi.structural_map(body, (tirx.BufferStore, flatten_store), order="post")
    return LoopStage(body, stage.item, stage.label)
