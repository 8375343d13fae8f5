"""Converters for indexing by tensors, with torch's rules and never outside the array."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import te, tirx

from shohin.backends.tvm.generic.expressions import Expr, RefusedError, constant
from shohin.backends.tvm.generic.relax_values import Importer, Value, argument, value_shape


def embedding(node: fx.Node, importer: Importer) -> Value:
    """``embedding(weight, indices)``."""
    weight, indices = (importer.env[source] for source in node.args[:2])
    return _emit(importer, weight, [indices])


def index_select(node: fx.Node, importer: Importer) -> Value:
    """``index_select(data, axis, indices)``."""
    data, indices = importer.env[node.args[0]], importer.env[node.args[2]]
    axis = argument(node, 1, "dim") % len(value_shape(data))
    return _emit(importer, data, [*[None] * axis, indices])


def select(node: fx.Node, importer: Importer) -> Value:
    """``select(data, axis, position)``."""
    data = importer.env[node.args[0]]
    shape = value_shape(data)
    axis = argument(node, 1, "dim") % len(shape)
    position = constant(argument(node, 2, "index") % shape[axis])

    def compute(source: Any) -> Any:
        rest = [*shape[:axis], *shape[axis + 1 :]]
        return te.compute(rest, lambda *i: source(*i[:axis], position, *i[axis:]), name="select")

    return importer.block_builder.emit_te(compute, data)


def index(node: fx.Node, importer: Importer) -> Value:
    """``data[indices]``, with None for axes that are taken whole."""
    given: Any = node.args[1]
    indices = [None if source is None else importer.env[source] for source in given]
    return _emit(importer, importer.env[node.args[0]], indices)


def _emit(importer: Importer, data: Value, indices: Sequence[Value | None]) -> Value:
    axes = [axis for axis, table in enumerate(indices) if table is not None]
    tables = [table for table in indices if table is not None]
    if any(str(table.ty.dtype) == "bool" for table in tables):
        raise RefusedError("indexing by a mask gives a shape that is known only at run time")
    shared = np.broadcast_shapes(*(value_shape(table) for table in tables))
    return importer.block_builder.emit_te(_lookup(axes, shared), data, *tables)


def _lookup(axes: Sequence[int], shared: Sequence[int]) -> Callable[..., Any]:
    """Index the axes by tables that are broadcast to one shape.

    The shared axes come where the indexed ones were, or first where those were not neighbours.
    """
    neighbours = list(axes) == list(range(axes[0], axes[0] + len(axes)))
    first = axes[0] if neighbours else 0

    def compute(data: Any, *tables: Any) -> Any:
        whole = [axis for axis in range(len(data.shape)) if axis not in axes]
        shape = [data.shape[axis] for axis in whole]
        shape[first:first] = shared

        def element(*indices: Expr) -> Expr:
            chosen = indices[first : first + len(shared)]
            rest = [*indices[:first], *indices[first + len(shared) :]]
            place = dict(zip(whole, rest, strict=True))
            for axis, table in zip(axes, tables, strict=True):
                place[axis] = _inside(_broadcast_element(table, chosen), data.shape[axis])
            return data(*(place[axis] for axis in range(len(data.shape))))

        return te.compute(shape, element, name="lookup")

    return compute


def _broadcast_element(table: Any, indices: Sequence[Expr]) -> Expr:
    """The element of a table at indices of a shape that it is broadcast to."""
    own = list(indices[len(indices) - len(table.shape) :])
    for axis, extent in enumerate(table.shape):
        own[axis] = constant(0) if int(extent) == 1 else own[axis]
    return tirx.Cast("int64", table(*own))


def _inside(position: Expr, extent: Any) -> Expr:
    """Count from the end where negative; keep within the axis whatever the table holds."""
    length = constant(int(extent))
    counted = tirx.Select(position < constant(0), position + length, position)
    return tirx.Max(tirx.Min(counted, length - constant(1)), constant(0))
