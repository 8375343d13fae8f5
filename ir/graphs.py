"""Graphs as networkx sees them, for questions that graph algorithms answer."""

from collections.abc import Iterable
from typing import TypeAlias

import networkx as nx
from torch import fx

Flow: TypeAlias = "nx.DiGraph[fx.Node]"
_ROOT = "root"


def to_networkx(graph: fx.Graph) -> Flow:
    """The data flow of a graph: an edge from each node to each of its users."""
    flow: Flow = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((node, user) for node in graph.nodes for user in node.users)
    return flow


def reachable_from_inputs(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose value depends on an input; the others are constants. Inputs included."""
    return _reach(to_networkx(graph), graph.find_nodes(op="placeholder"))


def dead_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that no output needs, users before what they use. Inputs are never dead."""
    needed = _reach(to_networkx(graph).reverse(copy=False), graph.find_nodes(op="output"))
    return [node for node in reversed(graph.nodes) if _can_die(node) and node not in needed]


def immediate_dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """For each node that an input reaches, the nearest node that every path from inputs crosses.

    Returns:
        None for inputs, and where paths from different inputs meet first.
    """
    flow = to_networkx(graph)
    return _dominators(flow, graph.find_nodes(op="placeholder"))


def immediate_post_dominators(graph: fx.Graph) -> dict[fx.Node, fx.Node | None]:
    """For each node that reaches the output, the nearest node that every path there crosses.

    Returns:
        None for the output itself.
    """
    flow = to_networkx(graph).reverse(copy=False)
    return _dominators(flow, graph.find_nodes(op="output"))


def topological_generations(graph: fx.Graph) -> list[list[fx.Node]]:
    """The nodes in layers: each depends on earlier layers only. Graph order within a layer."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    layers = nx.topological_generations(to_networkx(graph))
    return [sorted(layer, key=position.__getitem__) for layer in layers]


def schedule_order(graph: fx.Graph) -> list[fx.Node]:
    """A topological order that stays as near to the present order as the edges allow."""
    position = {node: index for index, node in enumerate(graph.nodes)}
    ordered = nx.lexicographical_topological_sort(to_networkx(graph), key=position.__getitem__)
    return list(ordered)


def _can_die(node: fx.Node) -> bool:
    return node.op not in {"placeholder", "output"}


def _reach(flow: Flow, starts: Iterable[fx.Node]) -> set[fx.Node]:
    starts = list(starts)
    return set(starts).union(*(nx.descendants(flow, start) for start in starts))


def _dominators(flow: Flow, starts: Iterable[fx.Node]) -> dict[fx.Node, fx.Node | None]:
    # A root above all starts makes several entries one, as dominance is defined for.
    rooted: nx.DiGraph[fx.Node | str] = nx.DiGraph(flow)
    rooted.add_edges_from((_ROOT, start) for start in starts)
    if _ROOT not in rooted:
        return {}
    found = nx.immediate_dominators(rooted, _ROOT)
    return {
        node: parent if isinstance(parent, fx.Node) else None
        for node, parent in found.items()
        if isinstance(node, fx.Node)
    }
