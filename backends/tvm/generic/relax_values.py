"""What converters share: arguments of ATen nodes, shapes of Relax values."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import fx

from shohin.backends.tvm.generic.expressions import int_of

Importer: TypeAlias = Any
Value: TypeAlias = Any
Converter: TypeAlias = Callable[[fx.Node, Importer], Value]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def value_shape(value: Value) -> tuple[int, ...]:
    """The shape of a Relax value as Python integers."""
    return tuple(int_of(extent) for extent in value.ty.shape.values)
