"""Instruction selection: from ATen nodes at concrete sizes to the backend's operations.

Each operator has a handler that either emits operations or declines, saying so by returning
False; runs of declined nodes become regions, which TVM's own legalisation compiles.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.lowering.operations import (
    Elementwise,
    FusedStep,
    Operation,
    Operations,
    Region,
    TernaryWeight,
    Value,
)
from shohin.errors import UnsupportedError
from shohin.ir.annotations import ActivationFormat, Origin, annotation
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import Program, tensor_of
from shohin.ir.shapes import fake_values
from shohin.ir.ternary import Ternary
from shohin.passes.patterns import argument

Handler: TypeAlias = Callable[["Selector", fx.Node], bool]

_LARGEST_FOLDED = 4 << 20
"""Bytes of the largest result that is computed at compile time."""

_SPARSE_TERNARY = 0.4
"""Density of ternary weights up to which lists of those that are not zero are tried as well.

Measured on Zen 3, 3 x 3 convolutions: lists are a quarter faster than packed weights at 0.4 and
as fast at 0.5, but take ten times the memory.
"""


class Selector:
    """Walks a graph once and collects operations.

    Args:
        program: what to select for.
        batch: size of the symbolic batch.
        handlers: emitters by operator.
        fixed_handler: emits fixed-point nodes, which it is asked about first.
        passing: operators whose handlers take integers that stand for numbers as well.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        handlers: dict[Any, Handler],
        fixed_handler: Handler = lambda selector, node: False,
        passing: Collection[Any] = (),
    ) -> None:
        self.program = program
        self.handlers = handlers
        self._fixed_handler = fixed_handler
        self._passing = passing
        self.fakes = fake_values(program.module, program.inputs, batch)
        self.values: dict[fx.Node, Value] = {}
        self.operations: list[Operation] = []
        self.split_nodes: set[fx.Node] = set()
        self._pending: list[fx.Node] = []
        self._taken: set[fx.Node] = set()
        self._constants: dict[str, Value] = {}
        self._known: dict[fx.Node, Tensor] = {}
        self.fixed: dict[fx.Node, Value] = {}
        self._folds = not any(_mutates(node) for node in program.graph.nodes)

    def select(self) -> Operations:
        """The whole program as operations."""
        inputs = []
        outputs: list[Value] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                inputs.append(self._define(node))
            elif node.op == "get_attr":
                self.values[node] = self.constant(str(node.target))
                self._known[node] = tensor_of(self.program.module, str(node.target)).detach()
            elif node.op == "output":
                results = _flatten(node.args[0])
                self._make_real(results)
                self._flush()
                outputs = [self.value(result) for result in results]
            elif self._computes_tensor(node) and node not in self._taken and not self._fold(node):
                self._select_node(node)
        return Operations(inputs, outputs, self.operations)

    def _select_node(self, node: fx.Node) -> None:
        if self._fixed_handler(self, node):
            return
        handler = self.handlers.get(node.target)
        given = [one for one in node.all_input_nodes if one in self.fixed]
        if handler is not None and node.target in self._passing and given and handler(self, node):
            return
        self._make_real(given)
        if handler is not None and self._settled(node) and handler(self, node):
            return
        self._pending.append(node)
        if not isinstance(self.fakes[node], Tensor):
            # Only the parts of a result can leave a region: they stay with what they are part of.
            parts = [user for user in node.users if self._computes_tensor(user)]
            self._pending += parts
            self._taken.update(parts)

    def _fold(self, node: fx.Node) -> bool:
        """Compute a small node here and now, if no input of the program has a part in it."""
        fake = self.fakes[node]
        inputs = [n for n in node.all_input_nodes if self._computes_tensor(n)]
        if not self._folds or not isinstance(fake, Tensor) or not _is_deterministic(node):
            return False
        if fake.nbytes > _LARGEST_FOLDED or any(n not in self._known for n in inputs):
            return False
        arguments, keywords = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: self._known[n] if n in self._known else self.concrete(n),
        )
        with torch.no_grad():
            tensor = node.target(*arguments, **keywords)  # type: ignore[operator]
        self._known[node] = tensor.contiguous()
        self.values[node] = Value(node.name, tuple(tensor.shape), tensor.dtype, self._known[node])
        return True

    def _make_real(self, nodes: Iterable[object]) -> None:
        """Convert what is only there as integers."""
        for node in nodes:
            if isinstance(node, fx.Node) and node in self.fixed and node not in self.values:
                self._realise(node)

    def _realise(self, node: fx.Node) -> None:
        """Emit the conversion of integers to the numbers that they stand for."""
        integers, carried = self.fixed[node], annotation(node, ActivationFormat)
        if carried is None:
            raise AssertionError("integers have a format")
        value = Value(node.name, integers.shape, torch.float32)
        step = FusedStep(Step("fixed-real", (carried.fraction,)))
        label = self.label(node, "to real")
        self.emit(Elementwise(value, label, integers, steps=[step]))
        self.values[node] = value

    def flush_for(self, node: fx.Node) -> None:
        """Emit the pending region if it computes a node."""
        if node in self._pending:
            self._flush()

    def _settled(self, node: fx.Node) -> bool:
        """Whether the node's inputs are computed once the pending region is emitted."""
        self._flush_if_needed(node)
        return all(
            n in self.values or n in self.split_nodes or not self._computes_tensor(n)
            for n in node.all_input_nodes
        )

    def _flush_if_needed(self, node: fx.Node) -> None:
        if any(n in self._pending for n in node.all_input_nodes):
            self._flush()

    def _computes_tensor(self, node: fx.Node) -> bool:
        fake = self.fakes[node]
        return isinstance(fake, Tensor) or (
            isinstance(fake, (tuple, list)) and any(isinstance(item, Tensor) for item in fake)
        )

    def value(self, node: object) -> Value:
        """The value a node computes."""
        if not isinstance(node, fx.Node) or node not in self.values:
            raise UnsupportedError(
                f"output '{node}'", "expected a tensor that the graph computes, got something else"
            )
        return self.values[node]

    def constant(self, name: str) -> Value:
        """The value of a weight."""
        if name not in self._constants:
            tensor = tensor_of(self.program.module, name).detach()
            self._constants[name] = Value(name, tuple(tensor.shape), tensor.dtype, tensor)
        return self._constants[name]

    def _define(self, node: fx.Node) -> Value:
        fake = self.fakes[node]
        if not isinstance(fake, Tensor):
            raise UnsupportedError(f"node '{node.name}'", f"computes a {type(fake).__name__}")
        value = Value(node.name, tuple(int(s) for s in fake.shape), fake.dtype)
        self.values[node] = value
        return value

    def result(self, node: fx.Node) -> Value:
        """A new value for what the node computes."""
        return self._define(node)

    def passable(self, item: object) -> Value | None:
        """What is passed on of a node's result: integers where there are some.

        None for what is no node, or not computed yet.
        """
        if not isinstance(item, fx.Node):
            return None
        return self.fixed.get(item) or self.values.get(item)

    def passed(self, node: fx.Node, x: Value) -> Value:
        """A new value for a node that gives numbers of another value."""
        value = self._define(node)
        if x.fixed:
            del self.values[node]
            value = Value(value.name, value.shape, x.dtype, fixed=True, nonnegative=x.nonnegative)
            self.fixed[node] = value
        return value

    def temporary(self, node: fx.Node, suffix: str, shape: tuple[int, ...]) -> Value:
        """A value of no node of its own, e.g. a transposed operand."""
        return Value(f"{node.name}_{suffix}", shape, torch.float32)

    def emit(self, operation: Operation) -> None:
        """Append an operation."""
        self.operations.append(operation)

    def label(self, node: fx.Node, what: str) -> str:
        """Text for profiles: the source module and what is computed."""
        origin = annotation(node, Origin)
        module = origin.module if origin and origin.module else node.name
        return f"{module}: {what}"

    def argument(self, node: fx.Node, name: str, default: Any = None) -> Any:
        """An operator's argument with every symbolic number made concrete."""
        return self.concrete(argument(node, name, default))

    def concrete(self, item: Any) -> Any:
        """Nodes that compute numbers replaced by the numbers, in nested lists too."""
        if isinstance(item, fx.Node):
            fake = self.fakes[item]
            return item if self._computes_tensor(item) else _plain_number(fake)
        if isinstance(item, (list, tuple)):
            return [self.concrete(part) for part in item]
        return item

    def tensor(self, node: fx.Node, name: str) -> Value | None:
        """The value of a tensor argument, or None where it was not given."""
        found = argument(node, name)
        return self.values.get(found) if isinstance(found, fx.Node) else None

    def is_sparse(self, node: fx.Node, name: str) -> bool:
        """Whether a weight is stored as sparse, or as ternary with few that are not zero."""
        encoding = self._encoding(node, name)
        if isinstance(encoding, Ternary):
            return encoding.density <= _SPARSE_TERNARY
        return isinstance(encoding, Sparse)

    def ternary(self, node: fx.Node, name: str) -> TernaryWeight | None:
        """What a weight is made of that is stored as ternary, None for others."""
        encoding = self._encoding(node, name)
        if not isinstance(encoding, Ternary) or encoding.dtype != torch.float32:
            return None
        signed = encoding.pairs() * torch.tensor([1.0, -1.0])
        return TernaryWeight(encoding.codes, signed.expand(encoding.shape[0], 2))

    def shared_values(self, node: fx.Node, name: str) -> Tensor | None:
        """The few values that the elements of a weight have, None where they are not shared."""
        encoding = self._encoding(node, name)
        kept = encoding.values if isinstance(encoding, Sparse) else encoding
        if not isinstance(kept, Codebook):
            return None
        centroids = kept.centroids.detach()
        return centroids if kept is encoding else torch.cat([centroids, centroids.new_zeros(1)])

    def _encoding(self, node: fx.Node, name: str) -> Encoding | None:
        found = argument(node, name)
        if not isinstance(found, fx.Node) or found.op != "get_attr":
            return None
        return self.program.encodings.get(str(found.target))

    def _flush(self) -> None:
        """Emit the pending nodes as a region."""
        if self._pending:
            nodes, self._pending = self._pending, []
            self.operations.append(self._region(nodes))

    def _region(self, nodes: list[fx.Node]) -> Region:
        inside = set(nodes)
        outer = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside)
        tensors = [n for n in outer if self._computes_tensor(n)]
        graph = fx.Graph()
        copies: dict[fx.Node, Any] = {n: graph.placeholder(n.name) for n in tensors}
        copies |= {n: self.concrete(n) for n in outer if n not in copies}
        for node in nodes:
            copies[node] = self._copy_concrete(graph, node, copies)
        results = [
            node
            for node in nodes
            if isinstance(self.fakes[node], Tensor) and any(u not in inside for u in node.users)
        ]
        graph.output(tuple(copies[node] for node in results))
        values = [self.values[n] for n in tensors]
        defined = [self._define(node) for node in results]
        label = self.label(nodes[-1], "+".join(_short_name(node) for node in nodes[:6]))
        module = fx.GraphModule(torch.nn.Module(), graph)
        return Region(defined[0], label, module, values, defined, nodes)

    def _copy_concrete(self, graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> fx.Node:
        """Copy a node; numbers that the program computes become the numbers they are here."""

        def resolve(used: fx.Node) -> Any:
            return copies[used] if self._computes_tensor(used) else self.concrete(used)

        arguments = fx.node.map_arg(node.args, resolve)
        keywords = fx.node.map_arg(node.kwargs, resolve)
        return graph.create_node(node.op, node.target, arguments, keywords, node.name)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_deterministic(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _plain_number(fake: object) -> object:
    return int(fake) if isinstance(fake, torch.SymInt) else fake


def _flatten(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (list, tuple)) else [results]


def _short_name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]
