"""What passes and analyses need to know about the operators of a graph.

Everything here is decided by an operator's target and schema, never by the name of a node.
"""

import math
from dataclasses import dataclass

import torch
from torch import fx

from shohin.ir.fixed_ops import fixed_conv2d, fixed_linear
from shohin.passes.patterns import argument, constant_weight

_aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {
        _aten.conv1d.default,
        _aten.conv2d.default,
        _aten.conv3d.default,
        _aten.conv1d.padding,
        _aten.conv2d.padding,
        _aten.conv3d.padding,
    }
)
TRANSPOSED_CONVOLUTIONS = frozenset(
    {
        _aten.conv_transpose1d.default,
        _aten.conv_transpose2d.input,
        _aten.conv_transpose3d.input,
    }
)
LINEARS = frozenset({_aten.linear.default})
WEIGHTED = CONVOLUTIONS | TRANSPOSED_CONVOLUTIONS | LINEARS | {_aten.convolution.default}

FIXED_WEIGHTED = frozenset({fixed_conv2d, fixed_linear})

# Operators whose schema promises a fresh tensor but whose content is whatever memory held.
_UNINITIALISED = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty"})


@dataclass(frozen=True)
class WeightedOperation:
    """A convolution or linear node, its parts named.

    Attributes:
        node: the node.
        data: the node that gives its input.
        weight: the node that gives its weight. Convolution `[out, in / groups, *kernel]`,
            transposed `[in, out / groups, *kernel]`, linear `[out, in]`.
        bias: the node that gives its bias, or None.
        groups: number of groups.
        transposed: whether it is a transposed convolution.
        linear: whether it is a linear map.
    """

    node: fx.Node
    data: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    groups: int
    transposed: bool
    linear: bool


def weighted_operation(node: fx.Node) -> WeightedOperation | None:
    """The parts of a convolution or linear node; None for any other node."""
    if node.op != "call_function" or node.target not in WEIGHTED:
        return None
    transposed = node.target in TRANSPOSED_CONVOLUTIONS or bool(argument(node, "transposed", False))
    data, weight = argument(node, "input", None), argument(node, "weight", None)
    if not isinstance(data, fx.Node) or not isinstance(weight, fx.Node):
        return None
    bias = argument(node, "bias", None)
    return WeightedOperation(
        node,
        data,
        weight,
        bias if isinstance(bias, fx.Node) else None,
        int(str(argument(node, "groups", 1))),
        transposed,
        node.target in LINEARS,
    )


def weight_of(node: fx.Node) -> fx.Node | None:
    """The node that gives the weight of a convolution or linear map, fixed-point ones included."""
    if node.op == "call_function" and node.target in FIXED_WEIGHTED:
        found = argument(node, "weight")
        return found if isinstance(found, fx.Node) else None
    operation = weighted_operation(node)
    return operation.weight if operation is not None else None


def pads_with_zeros(operation: WeightedOperation) -> bool:
    """Whether zeros beside its input reach the results of a convolution.

    Of a transposed one they always do: its taps at the border have no input.
    """
    if operation.transposed:
        return True
    padding = argument(operation.node, "padding", ())
    if padding == "same":
        weight = constant_weight(operation.weight)
        return weight is None or math.prod(weight.shape[2:]) > 1
    return padding != "valid" and any(width != 0 for width in padding)


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers.

    Dropout and attention carry the tag of random operators in every mode; they draw only when
    they train and their probability is not zero.
    """
    tags = getattr(node.target, "tags", ())
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded not in tags:
        return False
    probability = argument(node, "p", argument(node, "dropout_p", 1.0))
    return probability != 0 and argument(node, "train", True) is not False


def is_impure(node: fx.Node) -> bool:
    """Whether removing an unused node, or computing it once and for all, can be noticed."""
    return node.is_impure(impure_random=False) or is_random(node)


def is_uninitialised(node: fx.Node) -> bool:
    """Whether the node's values are whatever the memory held."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in _UNINITIALISED
