"""What each node of a program costs."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from shohin.ir.program import Program, encoding_of, tensor_of, weight_names
from shohin.passes.analyses.liveness import liveness
from shohin.passes.analyses.operators import (
    FIXED_WEIGHTED,
    WEIGHTED,
    weight_of,
    weighted_operation,
)
from shohin.passes.analyses.shapes import Shapes, shapes
from shohin.passes.patterns import argument
from shohin.passes.remarks import NodeCost

_aten = torch.ops.aten


@dataclass(frozen=True)
class WeightCost:
    """What one weight costs.

    Attributes:
        elements: number of elements of the dense tensor.
        nonzeros: elements that are stored; all of them unless an encoding leaves some out.
        stored_bytes: size as encoded.
        trainable: whether it is a parameter rather than a buffer.
    """

    elements: int
    nonzeros: int
    stored_bytes: int
    trainable: bool


@dataclass(frozen=True)
class OperationCost:
    """What one node costs at batch 1.

    A weight that several nodes read counts in full at each of them.

    Attributes:
        parameters: elements of the parameters that it reads, buffers left out.
        nonzeros: those of them that are not zero by encoding.
        macs: multiply-accumulates on dense weights.
        nonzero_macs: multiply-accumulates without those by zeros that an encoding leaves out.
        stored_bytes: size of the weights and buffers that it reads, as encoded.
        activation_bytes: size of the tensors that it gives.
    """

    parameters: int = 0
    nonzeros: int = 0
    macs: int = 0
    nonzero_macs: int = 0
    stored_bytes: int = 0
    activation_bytes: int = 0

    def for_remark(self) -> NodeCost:
        """The same as a remark states it: zeros that an encoding leaves out cost nothing."""
        return NodeCost(self.nonzeros, self.nonzero_macs, self.stored_bytes)


@dataclass(frozen=True)
class Cost:
    """What a program costs at batch 1.

    Attributes:
        nodes: cost of each operator, by node name.
        weights: cost of each weight that the graph reads, by name; tied weights once.
        peak_memory_bytes: most bytes of intermediate tensors, inputs and outputs included, that
            are live at once when the graph runs in its order.
    """

    nodes: Mapping[str, OperationCost]
    weights: Mapping[str, WeightCost]
    peak_memory_bytes: int

    @property
    def parameters(self) -> int:
        """Elements of all parameters, shared ones once, buffers left out."""
        return sum(weight.elements for weight in self.weights.values() if weight.trainable)

    @property
    def nonzeros(self) -> int:
        """Elements of all parameters without those that encodings leave out."""
        return sum(weight.nonzeros for weight in self.weights.values() if weight.trainable)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all nodes on dense weights."""
        return sum(node.macs for node in self.nodes.values())

    @property
    def nonzero_macs(self) -> int:
        """Multiply-accumulates of all nodes without zeros that encodings leave out."""
        return sum(node.nonzero_macs for node in self.nodes.values())

    @property
    def stored_bytes(self) -> int:
        """Size of all weights and buffers as encoded, shared ones once."""
        return sum(weight.stored_bytes for weight in self.weights.values())

    @property
    def activation_bytes(self) -> int:
        """Size of everything that the operators give, views included."""
        return sum(node.activation_bytes for node in self.nodes.values())


def cost(program: Program) -> Cost:
    """Parameters, multiply-accumulates, stored and activation bytes at batch 1.

    Counts convolutions (grouped and transposed), linear maps, matrix products and attention;
    other operators count no multiply-accumulates.
    """
    layouts = shapes(program)
    weights = {name: _weight_cost(program, name) for name in weight_names(program)}
    nodes = {
        node.name: _operation_cost(node, layouts, weights)
        for node in program.graph.nodes
        if node.op == "call_function"
    }
    once = {id(tensor_of(program.module, name)): name for name in reversed(weights)}
    kept = {name: weights[name] for name in weights if name in set(once.values())}
    return Cost(nodes, kept, liveness(program).peak_bytes)


def multiply_accumulates(node: fx.Node, layouts: Shapes) -> int:
    """Multiply-accumulates of a node on dense weights; 0 for operators that are not counted.

    A convolution counts every tap of every output, those that fall on padding included, as the
    published numbers do.
    """
    if node.target in WEIGHTED:
        return _weighted_macs(node, layouts)
    if node.target in FIXED_WEIGHTED:
        weight = argument(node, "weight")
        return layouts.of(node).elements * math.prod(layouts.of(weight).shape[1:])
    count = _PRODUCTS.get(node.target)
    return count(node, layouts) if count else 0


def _weighted_macs(node: fx.Node, layouts: Shapes) -> int:
    operation = weighted_operation(node)
    if operation is None:
        return 0
    weight = layouts.of(operation.weight).shape
    positions = layouts.of(operation.data if operation.transposed else node).elements
    return positions * math.prod(weight[1:])


def _product_macs(left: str) -> Callable[[fx.Node, Shapes], int]:
    """Counter of a matrix product whose left factor is the argument of that name."""

    def count(node: fx.Node, layouts: Shapes) -> int:
        factor = argument(node, left, None)
        if not isinstance(factor, fx.Node):
            return 0
        return layouts.of(node).elements * layouts.of(factor).shape[-1]

    return count


def _attention_macs(node: fx.Node, layouts: Shapes) -> int:
    """Query times key, and the weights times value: `heads * queries * keys * (e + e_value)`."""
    factors = [argument(node, name, None) for name in ("query", "key", "value")]
    query, key, value = (layouts.of(part).shape for part in factors if isinstance(part, fx.Node))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


_PRODUCTS: Mapping[object, Callable[[fx.Node, Shapes], int]] = {
    _aten.mm.default: _product_macs("self"),
    _aten.mv.default: _product_macs("self"),
    _aten.dot.default: _product_macs("self"),
    _aten.bmm.default: _product_macs("self"),
    _aten.matmul.default: _product_macs("self"),
    _aten.addmm.default: _product_macs("mat1"),
    _aten.baddbmm.default: _product_macs("batch1"),
    _aten.scaled_dot_product_attention.default: _attention_macs,
}


def _weight_cost(program: Program, name: str) -> WeightCost:
    encoding = encoding_of(program, name)
    elements = encoding.parameters()
    encoded = name in program.encodings
    tensor = tensor_of(program.module, name)
    return WeightCost(
        elements,
        encoding.nonzeros() if encoded else elements,
        encoding.stored_bytes(),
        isinstance(tensor, nn.Parameter),
    )


def _operation_cost(
    node: fx.Node, layouts: Shapes, weights: Mapping[str, WeightCost]
) -> OperationCost:
    read = {str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}
    costs = [weights[name] for name in sorted(read) if name in weights]
    trained = [weight for weight in costs if weight.trainable]
    macs = multiply_accumulates(node, layouts)
    return OperationCost(
        parameters=sum(weight.elements for weight in trained),
        nonzeros=sum(weight.nonzeros for weight in trained),
        macs=macs,
        nonzero_macs=_scale(macs, node, weights),
        stored_bytes=sum(weight.stored_bytes for weight in costs),
        activation_bytes=sum(layout.bytes for layout in layouts.tensors[node.name]),
    )


def _scale(macs: int, node: fx.Node, weights: Mapping[str, WeightCost]) -> int:
    """The share of the multiply-accumulates that the weight's non-zeros take part in."""
    read = weight_of(node)
    weight = weights.get(str(read.target)) if read is not None else None
    if weight is None or weight.elements == 0:
        return macs
    return macs * weight.nonzeros // weight.elements
