"""A node of a graph replaced by a chain of convolutions or linear maps."""

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from shohin.ir.program import Program, remove_unused_tensors
from shohin.passes.factoring.factors import Chain
from shohin.passes.factoring.layers import Layer
from shohin.passes.patterns import Rewriter, argument


@dataclass(frozen=True)
class Written:
    """What became of a layer.

    Attributes:
        nodes: the new nodes, in the order in which they run.
        names: the names of their weights.
    """

    nodes: tuple[fx.Node, ...]
    names: tuple[str, ...]


def write_chain(program: Program, layer: Layer, chain: Chain, made_by: str) -> Written:
    """Replace a layer by a chain, in place.

    Args:
        program: the program.
        layer: a layer of it.
        chain: what computes about the same.
        made_by: name of the pass.
    """
    rewriter = Rewriter(program, made_by)
    old, stem = layer.node, _stem(layer.name)
    dtype = layer.candidate.weight.dtype
    data, nodes, names = argument(old, "input"), [], []
    last = len(chain.weights) - 1
    for number, weight in enumerate(chain.weights):
        name = f"{stem}.{number}.weight"
        reader = rewriter.add_weight(name, weight.to(dtype), replaces=old)
        bias = None
        if number == last and chain.bias is not None:
            bias = rewriter.add_weight(f"{stem}.{number}.bias", chain.bias.to(dtype), replaces=old)
        places = () if layer.linear else _places(layer, chain.takes[number])
        data = rewriter.call(cast("Any", old.target), data, reader, bias, *places, replaces=old)
        nodes.append(data)
        names.append(str(reader.target))
    rewriter.replace_uses(old, data)
    sources = [one for one in old.all_input_nodes if one.op == "get_attr"]
    rewriter.erase(old)
    rewriter.erase(*(one for one in sources if not one.users))
    remove_unused_tensors(program.module)
    program.graph.lint()
    program.module.recompile()
    return Written(tuple(nodes), tuple(names))


def _stem(name: str) -> str:
    owner, _, leaf = name.rpartition(".")
    prefix = f"{owner}." if owner else ""
    return f"{prefix}factors" if leaf == "weight" else f"{prefix}{leaf}_factors"


def _places(layer: Layer, takes: tuple[bool, bool]) -> tuple[Any, ...]:
    """Stride, padding and dilation of a part of the chain.

    Args:
        layer: the layer.
        takes: whether the part has the layer's rows of taps, and its columns.
    """
    node, unfolding = layer.node, layer.unfolding
    stride = [own if takes[axis] else 1 for axis, own in enumerate(unfolding.stride)]
    dilation = [own if takes[axis] else 1 for axis, own in enumerate(unfolding.dilation)]
    padding = argument(node, "padding")
    if not isinstance(padding, str):
        left, _, top, _ = unfolding.margins
        padding = [own if takes[axis] else 0 for axis, own in enumerate((top, left))]
    return (stride, padding, dilation)
