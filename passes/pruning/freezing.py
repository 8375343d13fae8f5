"""Which parameters belong to convolutions and which to linear maps, to train one kind alone."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import fx

from shohin.ir.program import Program, weight_names
from shohin.passes.analyses.operators import weighted_operation

Group: TypeAlias = Literal["conv", "fc"]

_aten = torch.ops.aten
_NORMS = frozenset({_aten.batch_norm.default, _aten._native_batch_norm_legit_no_training.default})


@dataclass(frozen=True)
class Members:
    """What belongs to one group of layers.

    Attributes:
        weights: names of the parameters and buffers.
        norms: names of the nodes that normalise by statistics.
        layers: number of convolutions, or of linear maps.
    """

    weights: tuple[str, ...]
    norms: tuple[str, ...]
    layers: int


def members(program: Program, group: Group) -> Members:
    """The layers of a kind, with all that works on their outputs up to the next of the other kind.

    So a batch normalisation, its scale, shift and statistics included, belongs with the
    convolution before it. What comes before the first convolution and linear map belongs to
    neither. A weight belongs where it is read first.

    Args:
        program: the program.
        group: ``conv`` for convolutions, ``fc`` for linear maps.
    """
    groups = _groups(program.graph)
    weights = tuple(
        name for name in weight_names(program) if _group_of_weight(program, name, groups) == group
    )
    inside = [node for node, found in groups.items() if found == group]
    norms = tuple(node.name for node in inside if node.target in _NORMS)
    layers = sum(weighted_operation(node) is not None for node in inside)
    return Members(weights, norms, layers)


def _groups(graph: fx.Graph) -> dict[fx.Node, Group]:
    """The group of each node that has one: its own, or else that of the data it works on."""
    groups: dict[fx.Node, Group] = {}
    for node in graph.nodes:
        operation = weighted_operation(node)
        if operation is not None:
            groups[node] = "fc" if operation.linear else "conv"
            continue
        found = next((groups[source] for source in node.all_input_nodes if source in groups), None)
        if found is not None:
            groups[node] = found
    return groups


def _group_of_weight(program: Program, name: str, groups: dict[fx.Node, Group]) -> Group | None:
    for node in program.graph.nodes:
        if any(_reads(source, name) for source in node.all_input_nodes):
            return groups.get(node)
    return None


def _reads(source: fx.Node, name: str) -> bool:
    return source.op == "get_attr" and source.target == name
