"""Remove what no output depends on."""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, fx

from shohin.ir.program import Fact, Program
from shohin.passes.analyses.operators import is_impure
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.remarks import NodeCost, Outcome, Reason, Remark


def _erase_nodes(program: Program, context: Context) -> int:
    """Erase unused nodes, last to first so that whole chains go; the number of erased ones."""
    unused = (
        node
        for node in reversed(program.graph.nodes)
        if node.op not in ("placeholder", "output") and not node.users
    )
    return sum(_erase(node, context) for node in unused)


def _erase(node: fx.Node, context: Context) -> bool:
    if is_impure(node):
        context.skipped(node, Reason.NOT_APPLICABLE, "unused, but it has an effect of its own")
        return False
    if not context.allows(node.name):
        context.skipped(node, Reason.EXCLUDED_BY_OPTION, "unused, but may not be changed")
        return False
    context.changed(node, "removed", "no output depends on it")
    node.graph.erase_node(node)
    return True


def _free_tensors(module: fx.GraphModule, context: Context) -> list[str]:
    """Take the parameters and buffers that the graph does not read from the module."""
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    held = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    unread = [(name, tensor) for name, tensor in held if not _is_read(name, read)]
    return [name for name, tensor in unread if _free(module, name, tensor, context)]


def _free(module: fx.GraphModule, name: str, tensor: Tensor, context: Context) -> bool:
    allowed = context.allows(name)
    outcome = Outcome.CHANGED if allowed else Outcome.SKIPPED
    reason = "freed" if allowed else str(Reason.EXCLUDED_BY_OPTION)
    path, _, leaf = name.rpartition(".")
    detail = "no node reads it"
    size = NodeCost(stored_bytes=tensor.numel() * tensor.element_size())
    context.remarks.append(
        Remark(context.pass_name, name, path, outcome, reason, detail, before=size)
    )
    if allowed:
        delattr(module.get_submodule(path), leaf)
        _drop_empty(module, path)
    return allowed


def _drop_empty(module: fx.GraphModule, path: str) -> None:
    """Delete the submodule at a path, then those above it, as long as nothing is left in them."""
    while path:
        owner = module.get_submodule(path)
        if owner._parameters or owner._buffers or owner._modules:
            return
        module.delete_submodule(path)
        path = path.rpartition(".")[0]


def _is_read(name: str, read: set[str]) -> bool:
    """Whether the graph reads the tensor or a module that holds it."""
    parts = name.split(".")
    return any(".".join(parts[:end]) in read for end in range(1, len(parts) + 1))


@dataclass(frozen=True, kw_only=True)
class EliminateDead(Pass):
    """Erase nodes whose values no output depends on, then weights that no node reads.

    Inputs stay, and so do operators that do something besides giving a value. Before::

        %linear = aten.linear(%x, @fc.weight)
        %linear_1 = aten.linear(%x, @aux.weight)
        return %linear

    After, and the module has no parameter ``aux.weight`` any more::

        %linear = aten.linear(%x, @fc.weight)
        return %linear
    """

    name: ClassVar[str] = "eliminate-dead"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.DEAD_REMOVED})

    def run(self, program: Program, context: Context) -> PassResult:
        """Erase dead nodes and free the weights that nothing reads."""
        erased = _erase_nodes(program, context)
        freed = _free_tensors(program.module, context)
        if not erased and not freed:
            return PassResult(program, modified=False)
        program.module.recompile()
        kept = {name: held for name, held in program.encodings.items() if name not in freed}
        return PassResult(replace(program, encodings=kept), modified=True)
