"""A node of a graph replaced by a chain of convolutions or linear maps."""

from itertools import count
from typing import Any, cast

from torch import fx

from shohin.ir.program import Program, remove_unused_tensors
from shohin.passes.factoring.factors import Chain, Step
from shohin.passes.factoring.layers import Layer
from shohin.passes.patterns import Rewriter, argument


def write_chain(program: Program, layer: Layer, chain: Chain, made_by: str) -> tuple[fx.Node, ...]:
    """Replace a layer by a chain, in place.

    Args:
        program: the program.
        layer: a layer of it.
        chain: what computes about the same.
        made_by: name of the pass.

    Returns:
        The new nodes, in the order in which they run.
    """
    rewriter = Rewriter(program, made_by)
    old, stem = layer.node, _free_stem(program, layer.name)
    dtype = layer.candidate.weight.dtype
    data, nodes = argument(old, "input"), []
    last = len(chain.weights) - 1
    for number, weight in enumerate(chain.weights):
        name = f"{stem}.{number}.weight"
        reader = rewriter.add_weight(name, weight.to(dtype), replaces=old)
        bias = None
        if number == last and chain.bias is not None:
            bias = rewriter.add_weight(f"{stem}.{number}.bias", chain.bias.to(dtype), replaces=old)
        places = () if layer.linear else _places(layer, chain.steps[number])
        data = rewriter.call(cast("Any", old.target), data, reader, bias, *places, replaces=old)
        nodes.append(data)
    rewriter.replace_uses(old, data)
    sources = [one for one in old.all_input_nodes if one.op == "get_attr"]
    rewriter.erase(old)
    rewriter.erase(*(one for one in sources if not one.users))
    remove_unused_tensors(program.module)
    program.graph.lint()
    program.module.recompile()
    return tuple(nodes)


def _free_stem(program: Program, name: str) -> str:
    """Where the factors of a weight go: a module that is not there yet."""
    path, _, leaf = name.rpartition(".")
    owner = program.module.get_submodule(path)
    stem = "factors" if leaf == "weight" else f"{leaf}_factors"
    tries = (stem if number == 0 else f"{stem}_{number}" for number in count())
    free = next(one for one in tries if not hasattr(owner, one))
    return f"{path}.{free}" if path else free


def _places(layer: Layer, step: Step) -> tuple[Any, ...]:
    """Stride, padding and dilation of a part of the chain: the layer's where it has its taps."""
    unfolding, takes = layer.unfolding, (step.rows, step.columns)
    stride = [own if takes[axis] else 1 for axis, own in enumerate(unfolding.stride)]
    dilation = [own if takes[axis] else 1 for axis, own in enumerate(unfolding.dilation)]
    padding = argument(layer.node, "padding")
    if not isinstance(padding, str):
        left, _, top, _ = unfolding.margins
        padding = [own if takes[axis] else 0 for axis, own in enumerate((top, left))]
    return (stride, padding, dilation)
