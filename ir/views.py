"""Which values of a graph are views of others, and how a write to a view reaches its base."""

import operator
import sys
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from shohin.errors import CaptureError

aten = torch.ops.aten
_HINT = "write it without changing a tensor in place"
_SAME_ORDER = {
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view_as.default,
}
_SPLITS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}


class Views:
    """The views among the values of a graph.

    Args:
        values: fake value of every node at one batch size.
        others: the same at another batch size, which tells the sizes that depend on it.
    """

    def __init__(self, values: Mapping[fx.Node, object], others: Mapping[fx.Node, object]) -> None:
        self._values = values
        self._others = others

    def base_of(self, node: fx.Node) -> fx.Node | None:
        """The argument that a node's value shares its memory with, or None."""
        if node.op != "call_function":
            return None
        storages = _storages(self._values.get(node))
        for argument in node.all_input_nodes:
            if storages & _storages(self._values.get(argument)):
                return argument
        return None

    def is_identity(self, view: fx.Node, base: fx.Node) -> bool:
        """Whether a view is just its base: the same elements in the same layout.

        Slices count only when they take everything at any batch size.
        """
        if view.target is aten.slice.Tensor:
            return self.is_full_slice(view)
        one, two = self._values[view], self._values[base]
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            return False
        return one.dtype == two.dtype and _layout(one) == _layout(two)

    def is_full_slice(self, node: fx.Node) -> bool:
        """Whether a node is the slice ``[:]``, which indexing leaves behind for each axis."""
        if node.target is not aten.slice.Tensor or node.kwargs:
            return False
        bounds = (*node.args[2:], *(0, sys.maxsize, 1)[len(node.args[2:]) :])
        whole = ((None, 0), (None, sys.maxsize), (1,))
        return all(bound in every for bound, every in zip(bounds, whole, strict=True))

    def scatter(self, view: fx.Node, value: fx.Node, base: fx.Node, current: fx.Node) -> fx.Node:
        """Make the node for a base's new value after a write to a view of it.

        Args:
            view: the node that made the view.
            value: the view's new value.
            base: the node that the view was made of.
            current: the base's value before the write.

        Raises:
            CaptureError: when there is no exact way.
        """
        if self.is_identity(view, base):
            return value
        if view.target is operator.getitem:
            return self._scatter_part(view, value, current)
        if view.target in _SAME_ORDER:
            return self._reshape_like(value, base, current)
        scatter = _SCATTERS.get(view.target)
        if scatter is None:
            raise no_exact_form(view, f"cannot write through a view made by {view.target}")
        return scatter(view, value, current)

    def _reshape_like(self, value: fx.Node, base: fx.Node, current: fx.Node) -> fx.Node:
        one, two = self._values[base], self._others[base]
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            raise no_exact_form(base, "cannot write through a view of several tensors")
        pairs = zip(one.shape, two.shape, strict=True)
        shape = [int(small) if small == large else -1 for small, large in pairs]
        if shape.count(-1) > 1:
            return make_node(value.graph, aten.reshape_as.default, (value, current))
        return make_node(value.graph, aten.reshape.default, (value, shape))

    def _scatter_part(self, view: fx.Node, value: fx.Node, current: fx.Node) -> fx.Node:
        """Write one part of a split back; `view` takes the part from the split."""
        split, index = view.args
        if not isinstance(split, fx.Node) or not isinstance(index, int):
            raise no_exact_form(view, "expected one part of a split")
        if split.target is aten.unbind.int:
            axis = _integer(split, 1, "dim", 0)
            return make_node(
                value.graph, aten.select_scatter.default, (current, value, axis, index)
            )
        if split.target not in _SPLITS:
            raise no_exact_form(view, f"cannot write through a part made by {split.target}")
        axis = _integer(split, 2, "dim", 0)
        start, stop = self._extent(split, index, axis)
        return make_node(
            value.graph, aten.slice_scatter.default, (current, value, axis, start, stop)
        )

    def _extent(self, split: fx.Node, index: int, axis: int) -> tuple[int, int]:
        sizes = [
            [int(part.shape[axis]) for part in parts if isinstance(part, Tensor)]
            for parts in (self._values[split], self._others[split])
            if isinstance(parts, (tuple, list))
        ]
        if len(sizes) != 2 or sizes[0] != sizes[1]:
            raise no_exact_form(split, "cannot write to a part of the batch")
        index %= len(sizes[0])
        return sum(sizes[0][:index]), sum(sizes[0][: index + 1])


def make_node(
    graph: fx.Graph,
    target: OpOverload,
    args: tuple[Argument, ...],
    kwargs: Mapping[str, Argument] | None = None,
) -> fx.Node:
    """Make a call named after its operator: ``relu``; torch.fx would say ``relu_default``."""
    name = target._schema.name.partition("::")[2]
    return graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)


def no_exact_form(node: fx.Node, problem: str, hint: str = _HINT) -> CaptureError:
    """The error for an in-place operator that cannot be made functional."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    line = f" at `{trace[-1].strip()}`" if trace else ""
    return CaptureError(f"node '{node.name}'{line}", problem, hint)


def _storages(value: object) -> set[int]:
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return {item.untyped_storage()._cdata for item in tensors if isinstance(item, Tensor)}


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()


def _integer(node: fx.Node, position: int, name: str, default: int) -> int:
    found = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
    if not isinstance(found, int):
        raise no_exact_form(node, f"expected a fixed '{name}', got {found}")
    return found


def _scatter_with(target: OpOverload) -> "_Scatter":
    """A write through a view whose scatter operator takes the arguments of the view."""

    def scatter(view: fx.Node, value: fx.Node, current: fx.Node) -> fx.Node:
        arguments = (current, value, *view.args[1:])
        return make_node(value.graph, target, arguments, dict(view.kwargs))

    return scatter


def _scatter_narrow(view: fx.Node, value: fx.Node, current: fx.Node) -> fx.Node:
    axis, start = _integer(view, 1, "dim", 0), _integer(view, 2, "start", 0)
    stop = start + _integer(view, 3, "length", 0)
    return make_node(value.graph, aten.slice_scatter.default, (current, value, axis, start, stop))


def _scatter_transpose(view: fx.Node, value: fx.Node, current: fx.Node) -> fx.Node:
    axes = (_integer(view, 1, "dim0", 0), _integer(view, 2, "dim1", 0))
    return make_node(value.graph, aten.transpose.int, (value, *axes))


def _scatter_t(view: fx.Node, value: fx.Node, current: fx.Node) -> fx.Node:
    return make_node(value.graph, aten.t.default, (value,))


def _scatter_permute(view: fx.Node, value: fx.Node, current: fx.Node) -> fx.Node:
    order = view.args[1] if len(view.args) > 1 else view.kwargs["dims"]
    if not isinstance(order, (tuple, list)):
        raise no_exact_form(view, f"expected a list of axes, got {order}")
    axes = [int(str(axis)) % len(order) for axis in order]
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    return make_node(value.graph, aten.permute.default, (value, inverse))


_Scatter: TypeAlias = Callable[[fx.Node, fx.Node, fx.Node], fx.Node]
_SCATTERS: dict[object, _Scatter] = {
    aten.diagonal.default: _scatter_with(aten.diagonal_scatter.default),
    aten.narrow.default: _scatter_narrow,
    aten.permute.default: _scatter_permute,
    aten.select.int: _scatter_with(aten.select_scatter.default),
    aten.slice.Tensor: _scatter_with(aten.slice_scatter.default),
    aten.t.default: _scatter_t,
    aten.transpose.int: _scatter_transpose,
}
