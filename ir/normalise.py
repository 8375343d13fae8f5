"""From an exported program to the form of graph that every pass can rely on."""

import copy
import operator
import re
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from shohin.errors import CaptureError
from shohin.ir.annotations import Origin, annotate
from shohin.ir.program import BATCH, Dimension, InputSpec, is_tensor_name, tensor_of

_CHECKS = {
    "_assert_async",
    "_assert_scalar",
    "_assert_tensor_metadata",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
}


def specify_inputs(exported: ExportedProgram) -> tuple[InputSpec, ...]:
    """The inputs of an exported program.

    Raises:
        CaptureError: when an input is not a tensor, or an axis besides the batch is symbolic.
    """
    signature = exported.graph_signature
    names = [s.arg.name for s in signature.input_specs if s.kind is InputKind.USER_INPUT]
    holders = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
    if not names:
        raise CaptureError("model", "expected at least one input, got none")
    symbols: set[str] = set()
    specs = [_specify(name, holders[name].meta.get("val"), symbols) for name in names]
    if len(symbols) > 1:
        raise CaptureError(
            "model",
            f"expected one symbolic size, the batch, got {', '.join(sorted(symbols))}",
            "export with fixed sizes on every other axis",
        )
    return tuple(specs)


def _specify(name: str, value: object, symbols: set[str]) -> InputSpec:
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"input '{name}'",
            f"expected a tensor, got {type(value).__name__}",
            "wrap the model in a module whose forward takes tensors only",
        )
    shape: list[Dimension] = []
    for axis, size in enumerate(value.shape):
        symbolic = not isinstance(size, int)
        if symbolic and axis > 0:
            raise CaptureError(
                f"input '{name}'",
                f"expected fixed sizes beyond the batch, got a symbolic size on axis {axis}",
                "export with a fixed size there",
            )
        symbols |= {str(size)} if symbolic else set()
        shape.append(BATCH if symbolic else int(size))
    return InputSpec(name, tuple(shape), value.dtype)


def name_outputs(exported: ExportedProgram) -> tuple[str, ...]:
    """Names of the outputs of a model that returns a dictionary or the like, by their paths.

    ``{"a": x, "b": (y, z)}`` gives ``a``, ``b_0`` and ``b_1``. A tensor, a tuple and a list have no
    names to give.
    """
    structure = exported.call_spec.out_spec
    if structure is None or structure.type in (None, tuple, list):
        return ()
    numbered = pytree.tree_unflatten(range(structure.num_leaves), structure)
    paths, _ = pytree.tree_flatten_with_path(numbered)
    names = tuple("_".join(_step_name(step) for step in path) for path, _ in paths)
    return names if all(names) and len(set(names)) == len(names) else ()


def _step_name(step: object) -> str:
    """The key, attribute or position of one step of a path, as a part of a file's name."""
    found = getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))
    return re.sub(r"\W", "_", str(found))


def normalise(exported: ExportedProgram) -> fx.GraphModule:
    """A plain graph module with weights of its own.

    Placeholders come first, one per input, then one node per weight that is used, then the
    operators. The output is one tensor or a flat tuple of tensors. Run-time checks are dropped.

    Raises:
        CaptureError: when an output is not a tensor.
    """
    if any(tensor.device.type != "cpu" for tensor in exported.state_dict.values()):
        exported = move_to_device_pass(copy.copy(exported), "cpu")
    source = exported.module(check_guards=False)
    _inline_grad_modes(source)
    graph = _rebuild(source)
    _drop_checks(graph)
    return fx.GraphModule(source, graph)


def _inline_grad_modes(source: fx.GraphModule) -> None:
    """Put the body of ``with torch.no_grad()`` and its like where the block is called."""
    grad_mode = torch.ops.higher_order.wrap_with_set_grad_enabled
    while calls := source.graph.find_nodes(op="call_function", target=grad_mode):
        _inline(source, *calls[0].args[1:], call=calls[0])


def _inline(source: fx.GraphModule, block: fx.Node, *operands: fx.Node, call: fx.Node) -> None:
    body = cast("fx.GraphModule", source.get_submodule(str(block.target)))
    values = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with source.graph.inserting_before(call):
        results = source.graph.graph_copy(body.graph, values)
    for part in list(call.users):
        index = cast("int", part.args[1])
        part.replace_all_uses_with(cast("tuple[fx.Node, ...]", results)[index])
        source.graph.erase_node(part)
    source.graph.erase_node(call)


def _rebuild(source: fx.GraphModule) -> fx.Graph:
    graph, copies = fx.Graph(), cast("dict[fx.Node, fx.Node]", {})
    nodes = list(source.graph.nodes)
    names = _first_names(source)
    by_target: dict[str, fx.Node] = {}

    def translate(node: fx.Node) -> fx.Node:
        return copies[node]

    for node in (node for node in nodes if node.op == "placeholder"):
        copies[node] = graph.node_copy(node, translate)
        copies[node].target = copies[node].name
    for node in (node for node in nodes if node.op == "get_attr" and node.users):
        target = names.get(str(node.target), str(node.target))
        if target not in by_target:
            by_target[target] = graph.get_attr(target)
        copies[node] = by_target[target]
    for node in (node for node in nodes if node.op not in {"placeholder", "get_attr", "output"}):
        copies[node] = graph.node_copy(node, translate)
        _annotate_origin(copies[node])
    graph.output(_flat_output(nodes[-1], translate))
    return graph


def _first_names(source: fx.GraphModule) -> dict[str, str]:
    """The first name of each tensor, by any of its names."""
    named = [
        *source.named_parameters(remove_duplicate=False),
        *source.named_buffers(remove_duplicate=False),
    ]
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def _annotate_origin(node: fx.Node) -> None:
    entries = [
        entry
        for key, entry in (node.meta.get("nn_module_stack") or {}).items()
        if not str(key).startswith("_empty")
    ]
    path, kind = entries[-1] if entries else ("", "")
    kind_name = kind if isinstance(kind, str) else kind.__name__
    annotate(node, Origin(path, kind_name.rpartition(".")[2]))


def _flat_output(node: fx.Node, translate: Callable[[fx.Node], fx.Node]) -> Any:
    found = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
    for index, value in enumerate(found):
        if not isinstance(value, fx.Node) or not _is_tensor(value):
            shown = value.meta.get("val") if isinstance(value, fx.Node) else value
            raise CaptureError(
                f"output {index}",
                f"expected a tensor, got {type(shown).__name__}",
                "return tensors only",
            )
    values = tuple(translate(cast("fx.Node", value)) for value in found)
    return values[0] if len(values) == 1 else values


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _drop_checks(graph: fx.Graph) -> None:
    """Erase run-time checks and what only they read."""
    for node in reversed(graph.nodes):
        unused = not node.users and node.op == "call_function"
        if unused and (_is_check(node) or _is_scalar_arithmetic(node)):
            graph.erase_node(node)


def _is_check(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._opname in _CHECKS


def _is_scalar_arithmetic(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", "")
    sym_size = node.target is torch.ops.aten.sym_size.int
    return sym_size or module in {operator.add.__module__, "math"}


def own_weights(module: fx.GraphModule) -> None:
    """Give a module contiguous copies of the tensors that its graph reads, and put it in eval."""
    for name in {str(node.target) for node in module.graph.find_nodes(op="get_attr")}:
        if is_tensor_name(module, name):
            _replace_by_copy(module, name)
    module.train(False)
    module.recompile()


def _replace_by_copy(module: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner, tensor = module.get_submodule(path), tensor_of(module, name)
    fresh = tensor.detach().clone(memory_format=torch.contiguous_format)
    delattr(owner, leaf)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, nn.Parameter(fresh, tensor.requires_grad))
    else:
        owner.register_buffer(leaf, fresh)
