"""Values inside of a network, layer after layer, without running it from its inputs each time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from shohin.ir.program import tensor_of
from shohin.passes.base import Batch
from shohin.passes.patterns import argument


@dataclass(frozen=True, eq=False)
class _Held:
    """Where a run of one batch stopped.

    Attributes:
        position: the node before which it stopped.
        values: what the nodes from there on still need, inputs and weights left out.
        bytes: memory of the values.
    """

    position: int
    values: Mapping[fx.Node, Any]
    bytes: int


class Prefixes:
    """Runs a graph on batches up to given nodes and goes on from there at the next request.

    What a batch needs to go on is held as long as all of it fits a limit; a batch that does not
    fit runs again from where it was held last, or from its inputs. Weights are read anew at every
    request, so they may be changed in place, but only those that no held value depends on: weights
    of the node that was asked for last and of those after it.

    Args:
        module: the graph module.
        limit: most bytes to hold, over all batches.
    """

    def __init__(self, module: fx.GraphModule, limit: int) -> None:
        self._module = module
        self._nodes = list(module.graph.nodes)
        self._dying = _dying(self._nodes)
        self._limit = limit
        self._held: dict[int, _Held] = {}

    def refresh(self) -> None:
        """Notice that nodes were replaced, all of them after what is held.

        The node that was asked for last may be among them, and what stands for it goes on from its
        input.
        """
        before = self._nodes
        self._nodes = list(self._module.graph.nodes)
        self._dying = _dying(self._nodes)
        places = [at for at, node in enumerate(self._nodes) if _is_computed(node)]
        for index, held in self._held.items():
            done = sum(_is_computed(node) for node in before[: held.position])
            self._held[index] = replace(held, position=places[done])

    def evaluate(
        self, index: int, batch: Batch, position: int, *, hold: bool = True
    ) -> tuple[Tensor, Tensor]:
        """What a convolution or linear map is given, and its output.

        Args:
            index: number of the batch.
            batch: its input tensors.
            position: the node, by its position in the graph.
            hold: whether later requests may go on from here; they must not be for earlier nodes.
        """
        interpreter = self.arrive(index, batch, position, hold=hold)
        node = self._nodes[position]
        with torch.no_grad():
            return interpreter.env[argument(node, "input")], interpreter.run_node(node)

    def outputs(self, index: int, batch: Batch) -> tuple[Tensor, ...]:
        """The network's outputs; nothing more is held than before."""
        last = len(self._nodes) - 1
        values = self._advance(index, batch, last).env
        return tuple(values[node] for node in self._nodes[last].all_input_nodes)

    def arrive(
        self, index: int, batch: Batch, position: int, *, hold: bool = True
    ) -> fx.Interpreter:
        """Run a batch up to a node; the values that it and those after it need are there then.

        Args:
            index: number of the batch.
            batch: its input tensors.
            position: the node, by its position in the graph.
            hold: whether later requests may go on from here; they must not be for earlier nodes.
        """
        interpreter = self._advance(index, batch, position)
        if hold:
            self._hold(index, position, interpreter.env)
        return interpreter

    def _advance(self, index: int, batch: Batch, position: int) -> fx.Interpreter:
        """Run a batch up to a node, from where it was held."""
        interpreter = fx.Interpreter(self._module, garbage_collect_values=False)
        environment = interpreter.env = self._weights() | self._inputs(batch)
        held = self._held.get(index)
        environment.update(held.values if held else {})
        with torch.no_grad():
            for node in self._nodes[held.position if held else 0 : position]:
                if _is_computed(node):
                    environment[node] = interpreter.run_node(node)
                for dead in self._dying.get(node, ()):
                    del environment[dead]
        return interpreter

    def _weights(self) -> dict[fx.Node, Any]:
        readers = self._module.graph.find_nodes(op="get_attr")
        return {node: tensor_of(self._module, str(node.target)) for node in readers}

    def _inputs(self, batch: Batch) -> dict[fx.Node, Any]:
        return dict(zip(self._module.graph.find_nodes(op="placeholder"), batch, strict=True))

    def _hold(self, index: int, position: int, environment: Mapping[fx.Node, Any]) -> None:
        computed = {node: value for node, value in environment.items() if _is_computed(node)}
        before = self._held.pop(index, None)
        fresh = _Held(position, computed, _bytes(computed))
        others = sum(one.bytes for one in self._held.values())
        if others + fresh.bytes <= self._limit:
            self._held[index] = fresh
        elif before is not None:
            self._held[index] = before


def _is_computed(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "get_attr")


def _dying(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By node, the computed values that nothing after it reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last |= dict.fromkeys(node.all_input_nodes, node)
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        if _is_computed(value):
            dying.setdefault(reader, []).append(value)
    return dying


def _bytes(values: Mapping[fx.Node, Any]) -> int:
    """Memory of the tensors among some values, what they share counted once."""
    tensors = [leaf for value in values.values() for leaf in _tensors(value)]
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in value for leaf in _tensors(part)] if isinstance(value, tuple) else []
