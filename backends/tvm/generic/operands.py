"""What torch does to operands without saying so, written into the graph.

Operators of torch promote operands of several types to one and check indices. TVM's importer does
neither, so the promotions become casts and every index from outside is kept within its axis.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

_ATEN = torch.ops.aten

_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_LOGIC = ("logical_and", "logical_or", "logical_xor", "logical_not")
_JOINS = ("cat", "stack")
_FOLDS = ("sum", "prod", "cumsum", "cumprod", "mean")
_COPIES = ("_to_copy", "to", "clone", "copy", "lift_fresh_copy", "fill")
_OF_BOOLEANS: dict[Any, Any] = {
    _ATEN.add.Tensor: _ATEN.logical_or.default,
    _ATEN.mul.Tensor: _ATEN.logical_and.default,
    _ATEN.maximum.default: _ATEN.logical_or.default,
    _ATEN.minimum.default: _ATEN.logical_and.default,
}
"""Arithmetic on truth values, for which TVM's own wraps around."""

_ALONG_AXIS = ("gather", "scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy")
_PUTS = ("index_put", "_unsafe_index_put")


def prepare_operands(traced: fx.GraphModule) -> None:
    """Make promotions explicit and indices safe.

    Args:
        traced: core ATen nodes with fake tensors in their metadata; changed in place.
    """
    for node in list(traced.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        name = operator_name(node)
        if name in _ALONG_AXIS:
            _keep_index_inside(node)
        elif name in _PUTS:
            _keep_indices_inside(node)
        dtype = _operand_type(node, name)
        if dtype is not None:
            _cast_operands(node, dtype, 1 if name == "where" else 0)
    traced.recompile()


def operator_name(node: fx.Node) -> str:
    """``add`` of ``aten.add.Tensor``."""
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _operand_type(node: fx.Node, name: str) -> torch.dtype | None:
    """The type in which the node computes, None where its operands are no business of ours."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or name in _COPIES:
        return None
    if name in _COMPARISONS:
        return torch.result_type(*(_value(argument) for argument in node.args[:2]))
    if name in _LOGIC:
        return torch.bool
    if value.dtype == torch.bool and name not in _JOINS:
        node.target = _OF_BOOLEANS.get(node.target, node.target)
        return None
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return value.dtype if pointwise or name in (*_FOLDS, *_JOINS) else None


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _cast_operands(node: fx.Node, dtype: torch.dtype, first: int) -> None:
    def cast(source: fx.Node) -> fx.Node:
        value = source.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype == dtype:
            return source
        return _call(node, _ATEN._to_copy.default, source, dtype=dtype)

    rest = fx.node.map_arg(node.args[first:], cast)
    node.args = (*node.args[:first], *rest)
    node.kwargs = fx.node.map_arg(node.kwargs, cast)


def _call(before: fx.Node, target: Any, *arguments: Any, **keywords: Any) -> fx.Node:
    """A new node before another, its metadata included."""
    graph = before.graph
    with graph.inserting_before(before):
        node = graph.call_function(target, arguments, keywords)
    node.meta["val"] = target(*(_value(a) for a in arguments), **keywords)
    return node


def _keep_index_inside(node: fx.Node) -> None:
    """The index is the third argument, its axis the second."""
    data, axis, index = node.args[:3]
    shape = _value(data).shape
    if not shape or not isinstance(index, fx.Node) or not isinstance(axis, int):
        return
    inside = _call(node, _ATEN.clamp.default, index, 0, max(int(shape[axis]) - 1, 0))
    node.update_arg(2, inside)


def _keep_indices_inside(node: fx.Node) -> None:
    """The second argument has an index, or none, for each of the first axes."""
    data, indices = node.args[:2]
    assert isinstance(indices, Sequence)
    shape = _value(data).shape
    kept = [_inside(node, index, int(n)) for index, n in zip(indices, shape, strict=False)]
    node.update_arg(1, kept)


def _inside(node: fx.Node, index: Any, extent: int) -> Any:
    """Count from the end where negative; keep within the axis."""
    if not isinstance(index, fx.Node) or _value(index).dtype == torch.bool:
        return index
    negative = _call(node, _ATEN.lt.Scalar, index, 0)
    from_end = _call(node, _ATEN.add.Scalar, index, extent)
    counted = _call(node, _ATEN.where.self, negative, from_end, index)
    return _call(node, _ATEN.clamp.default, counted, 0, max(extent - 1, 0))
