"""Compute what does not depend on the inputs once, at compile time."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from shohin.errors import SpecError
from shohin.ir.annotations import Origin, annotate, annotation
from shohin.ir.program import Fact, Program, is_tensor_name, tensor_of
from shohin.passes.analyses.operators import is_impure, is_uninitialised
from shohin.passes.analyses.shapes import shapes
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.remarks import NodeCost, Reason

WOULD_GROW = "would-grow"


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Folder:
    """Finds and replaces the constant subgraphs of one program."""

    def __init__(self, program: Program, max_growth: int, context: Context) -> None:
        self._program = program
        self._max_growth = max_growth
        self._context = context
        self._layouts = context.analyses.get(shapes, program)
        self._constant: set[fx.Node] = set()
        self._values: dict[fx.Node, Any] = {}
        for node in program.graph.nodes:
            if self._is_constant(node):
                self._constant.add(node)

    def run(self) -> int:
        """Fold from the outputs up, so that the largest subgraph wins; the number of folds."""
        return sum(self._visit(node) for node in reversed(list(self._program.graph.nodes)))

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return is_tensor_name(self._program.module, str(node.target))
        if node.op != "call_function" or is_impure(node) or is_uninitialised(node):
            return False
        return all(source in self._constant for source in node.all_input_nodes)

    def _visit(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node not in self._constant:
            return False
        if all(user in self._constant for user in node.users):
            return False
        obstacle = self._obstacle(node)
        if obstacle:
            # What it is computed from may still be folded, as arguments of a node that varies.
            self._constant.discard(node)
            self._context.skipped(node, *obstacle)
            return False
        self._replace(node)
        return True

    def _obstacle(self, node: fx.Node) -> tuple[str, str] | None:
        layouts = self._layouts.tensors[node.name]
        if len(layouts) != 1:
            return Reason.NOT_APPLICABLE, f"it gives {len(layouts)} tensors, not one"
        cone = self._cone(node)
        encoded = sorted(_weights(cone) & set(self._program.encodings))
        if encoded:
            return Reason.ALREADY_ENCODED, f"it depends on {', '.join(encoded)}"
        freed = sum(_bytes(self._tensor(name)) for name in _weights(_dead_with(node, cone)))
        growth = layouts[0].bytes - freed
        if growth > self._max_growth:
            detail = f"the model would grow by {growth} bytes, more than {self._max_growth}"
            return WOULD_GROW, detail
        if not self._context.allows(node.name):
            return Reason.EXCLUDED_BY_OPTION, "may not be changed"
        return None

    def _cone(self, node: fx.Node) -> list[fx.Node]:
        """Everything that the node is computed from, users before what they use."""
        seen: dict[fx.Node, None] = {}
        waiting = [node]
        while waiting:
            sources = [one for one in waiting.pop().all_input_nodes if one not in seen]
            seen |= dict.fromkeys(sources)
            waiting += sources
        order = {one: position for position, one in enumerate(self._program.graph.nodes)}
        return sorted(seen, key=order.__getitem__, reverse=True)

    def _tensor(self, name: str) -> Tensor:
        return tensor_of(self._program.module, name).detach()

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._tensor(str(node.target))
        if node not in self._values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), self._evaluate)
            with torch.no_grad():
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def _replace(self, node: fx.Node) -> None:
        # A view of a weight must not share memory with it: passes change weights in place.
        value = self._evaluate(node).clone(memory_format=torch.contiguous_format)
        name = self._free_name(f"folded_{node.name}")
        self._program.module.register_buffer(name, value)
        with self._program.graph.inserting_before(node):
            buffer = self._program.graph.get_attr(name)
        origin = annotation(node, Origin) or Origin("")
        made_by = self._context.pass_name
        annotate(buffer, Origin(origin.module, origin.module_type, made_by, (node.name,)))
        self._context.changed(
            node,
            "folded",
            f"computed once and kept as {name}",
            after=NodeCost(stored_bytes=_bytes(value)),
        )
        dead = _dead_with(node, self._cone(node))
        node.replace_all_uses_with(buffer)
        for one in (node, *dead):
            self._program.graph.erase_node(one)

    def _free_name(self, stem: str) -> str:
        name, number = stem, 0
        while hasattr(self._program.module, name):
            number += 1
            name = f"{stem}_{number}"
        return name


def _dead_with(node: fx.Node, cone: list[fx.Node]) -> list[fx.Node]:
    """The part of a node's cone that nothing else uses, users before what they use."""
    dead = {node: None}
    for source in cone:
        if all(user in dead for user in source.users):
            dead[source] = None
    return [one for one in dead if one is not node]


def _weights(nodes: list[fx.Node]) -> set[str]:
    return {str(node.target) for node in nodes if node.op == "get_attr"}


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute subgraphs that depend on weights and constants alone, and keep their results.

    The largest such subgraphs become buffers, named after the node they replace. Random operators
    are never folded, nor is anything computed from an encoded weight. Before::

        %exp = aten.exp(@scale)
        %mul = aten.mul.Tensor(%x, %exp)

    After::

        %mul = aten.mul.Tensor(%x, @folded_exp)

    Attributes:
        max_growth: bytes that one result may be larger than the weights it makes superfluous; a
            broadcast that would enlarge the model by more is computed at run time as before.
    """

    name: ClassVar[str] = "fold-constants"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.DEAD_REMOVED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.CONSTANTS_FOLDED})

    max_growth: int = 4096

    def validate(self) -> None:
        """Check the sign of the growth."""
        if self.max_growth < 0:
            raise SpecError(
                "fold-constants max_growth", f"expected 0 or more bytes, got {self.max_growth}"
            )

    def run(self, program: Program, context: Context) -> PassResult:
        """Fold the largest constant subgraphs that may be folded."""
        folded = _Folder(program, self.max_growth, context).run()
        if folded:
            program.module.recompile()
        return PassResult(program, modified=folded > 0)
