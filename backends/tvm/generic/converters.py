"""Converters for the operators that TVM's importer lacks or converts wrongly.

Each takes an ATen node and TVM's importer, and gives the Relax value of the node.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import ir, relax, te, tirx, topi

from shohin.backends.tvm.generic.expressions import int_of

Importer = Any
Value = Any
Converter = Callable[[fx.Node, Importer], Value]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(int_of(extent) for extent in value.ty.shape.values)


def _extreme(operator: Callable[..., Value]) -> Converter:
    """``amax`` and ``amin``: over some axes, all by default."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        axes = list(_argument(node, 1, "dim", ())) or None
        keep = _argument(node, 2, "keepdim", False)
        return importer.block_builder.emit(operator(importer.env[node.args[0]], axes, keep))

    return convert


def _first_index(extreme: Callable[..., Any], axis: int, keep: bool) -> Callable[[Any], Any]:
    """Index of the first extreme element along an axis, as two plain reductions."""

    def compute(data: Any) -> Any:
        best = extreme(data, axis=axis, keepdims=True)
        length = data.shape[axis]
        shape = list(data.shape)

        def position(*indices: Any) -> Any:
            hit = data(*indices) >= best(*indices[:axis], 0, *indices[axis + 1 :])
            if extreme is topi.min:
                hit = data(*indices) <= best(*indices[:axis], 0, *indices[axis + 1 :])
            index = tirx.Cast("int64", indices[axis])
            return tirx.Select(hit, index, tirx.Cast("int64", length - 1))

        return topi.min(te.compute(shape, position), axis=axis, keepdims=keep)

    return compute


def _index_of(importer: Importer, data: Value, extreme: Any, axis: int, keep: bool) -> Value:
    axis = axis % max(len(_shape(data)), 1)
    return importer.block_builder.emit_te(_first_index(extreme, axis, keep), data)


def _argument_of(extreme: Any) -> Converter:
    """``argmax`` and ``argmin``: over one axis, or the flattened array."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        data = importer.env[node.args[0]]
        axis = _argument(node, 1, "dim")
        keep = bool(_argument(node, 2, "keepdim", False))
        if axis is not None and _shape(data):
            return _index_of(importer, data, extreme, axis, keep)
        rank = len(_shape(data))
        flat = importer.block_builder.emit(relax.op.reshape(data, [int(np.prod(_shape(data)))]))
        index = _index_of(importer, flat, extreme, 0, False)
        return importer.block_builder.emit(relax.op.reshape(index, [1] * rank if keep else []))

    return convert


def _with_index(operator: Callable[..., Value], extreme: Any) -> Converter:
    """``max`` and ``min`` along an axis: values and indices."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        data = importer.env[node.args[0]]
        axis, keep = _argument(node, 1, "dim"), bool(_argument(node, 2, "keepdim", False))
        best = importer.block_builder.emit(operator(data, [axis], keep))
        return best, _index_of(importer, data, extreme, axis, keep)

    return convert


def _scan(operator: Callable[..., Any]) -> Converter:
    """``cumsum`` and ``cumprod``."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        data = importer.env[node.args[0]]
        axis = _argument(node, 1, "dim") % len(_shape(data))
        dtype = str(importer._convert_data_type(node.meta["val"].dtype))
        return importer.block_builder.emit_te(operator, data, axis, dtype)

    return convert


def _scalars_in_own_type(relax_operator: Callable[..., Value]) -> Converter:
    """A binary operator whose operands take the type that torch promotes them to."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        operands = [importer.env.get(a) if isinstance(a, fx.Node) else a for a in node.args[:2]]
        tensors = [a.meta["val"] for a in node.args[:2] if isinstance(a, fx.Node)]
        dtype = importer._convert_data_type(node.meta["val"].dtype)
        if node.meta["val"].dtype.is_floating_point is False and str(dtype) == "bool":
            dtype = importer._convert_data_type(tensors[0].dtype)
        left, right = (_in_type(importer, operand, str(dtype)) for operand in operands)
        return importer.block_builder.emit(relax_operator(left, right))

    return convert


def _in_type(importer: Importer, operand: Any, dtype: str) -> Value:
    if not isinstance(operand, ir.Expr):
        return relax.const(operand, dtype)
    if str(operand.ty.dtype) == dtype:
        return operand
    return importer.block_builder.emit(relax.op.astype(operand, dtype))


def _divide(node: fx.Node, importer: Importer) -> Value:
    """``div`` with a rounding mode."""
    mode = node.kwargs.get("rounding_mode")
    if mode == "floor":
        return _scalars_in_own_type(relax.op.floor_divide)(node, importer)
    if mode is None:
        return _scalars_in_own_type(relax.op.divide)(node, importer)
    if node.meta["val"].dtype.is_floating_point:
        quotient = _scalars_in_own_type(relax.op.divide)(node, importer)
        return importer.block_builder.emit(relax.op.trunc(quotient))
    left, right = (
        _in_type(
            importer,
            importer.env[a] if isinstance(a, fx.Node) else a,
            str(importer._convert_data_type(node.meta["val"].dtype)),
        )
        for a in node.args[:2]
    )
    return importer.block_builder.emit_te(_truncated_quotient, left, right)


def _truncated_quotient(left: Any, right: Any) -> Any:
    return topi.broadcast.trunc_divide(left, right) if hasattr(
        topi.broadcast, "trunc_divide"
    ) else topi.divide(left, right)


def _resize_sizes(node: fx.Node, importer: Importer) -> tuple[Value, tuple[int, ...], list[float]]:
    """Data, output height and width, and input pixels per output pixel along both."""
    data = importer.env[node.args[0]]
    size = [int(extent) for extent in node.meta["val"].shape[2:]]
    factors = _scale_factors(node)
    steps = [
        1.0 / factor if factor else extent / out
        for factor, extent, out in zip(factors, _shape(data)[2:], size, strict=True)
    ]
    return data, tuple(size), steps


def _scale_factors(node: fx.Node) -> Sequence[float | None]:
    """The scale factors that the node was given, None where only a size was."""
    last = node.args[-1]
    if str(node.target).endswith(".vec"):
        return list(last) if isinstance(last, list | tuple) and last else [None, None]
    given = [a for a in node.args[2:] if isinstance(a, float) or a is None]
    return (given + [None, None])[:2] if given else [None, None]


def _nearest(node: fx.Node, importer: Importer) -> Value:
    """``upsample_nearest2d``: rows, then columns, each picked by a table of indices."""
    data, size, steps = _resize_sizes(node, importer)
    for axis, (out, step) in enumerate(zip(size, steps, strict=True), start=2):
        extent = _shape(data)[axis]
        picked = np.floor(np.arange(out, dtype=np.float32) * np.float32(step))
        table = relax.const(np.minimum(picked, extent - 1).astype(np.int32))
        data = importer.block_builder.emit(relax.op.take(data, table, axis=axis, mode="fast"))
    return data


def _bilinear(node: fx.Node, importer: Importer) -> Value:
    """``upsample_bilinear2d``: columns first, so that rows are blended in whole vectors."""
    data, size, steps = _resize_sizes(node, importer)
    aligned = bool(node.args[2])
    for axis in (3, 2):
        extent, out = _shape(data)[axis], size[axis - 2]
        places = _source_places(extent, out, steps[axis - 2], aligned)
        low = np.minimum(places.astype(np.int32), extent - 1)
        share = (places - low).astype(np.float32)
        tables = [low, np.minimum(low + 1, extent - 1).astype(np.int32), share]
        constants = [relax.const(table) for table in tables]
        data = importer.block_builder.emit_te(_blend(axis), data, *constants)
    return data


def _source_places(extent: int, out: int, step: float, aligned: bool) -> Any:
    """Where output pixels lie among input pixels."""
    steps = np.arange(out, dtype=np.float32)
    if aligned:
        return steps * np.float32((extent - 1) / (out - 1) if out > 1 else 0.0)
    return np.maximum((steps + np.float32(0.5)) * np.float32(step) - np.float32(0.5), 0.0)


def _blend(axis: int) -> Callable[..., Any]:
    """``x[low] * (1 - share) + x[high] * share`` along an axis, by tables."""

    def compute(data: Any, low: Any, high: Any, share: Any) -> Any:
        shape = list(data.shape)
        shape[axis] = low.shape[0]

        def blended(*indices: Any) -> Any:
            place = indices[axis]

            def pick(table: Any) -> Any:
                return data(*indices[:axis], table(place), *indices[axis + 1 :])

            weight = share(place)
            return pick(low) * (tirx.const(1.0, "float32") - weight) + pick(high) * weight

        return te.compute(shape, blended, name="blend")

    return compute


CONVERTERS: dict[str, Converter] = {
    "amax.default": _extreme(relax.op.max),
    "amin.default": _extreme(relax.op.min),
    "argmax.default": _argument_of(topi.max),
    "argmin.default": _argument_of(topi.min),
    "max.dim": _with_index(relax.op.max, topi.max),
    "min.dim": _with_index(relax.op.min, topi.min),
    "cumsum.default": _scan(topi.cumsum),
    "cumprod.default": _scan(topi.cumprod),
    "div.Tensor_mode": _divide,
    "div.Scalar_mode": _divide,
    "div.Tensor": _scalars_in_own_type(relax.op.divide),
    "div.Scalar": _scalars_in_own_type(relax.op.divide),
    "floor_divide.default": _scalars_in_own_type(relax.op.floor_divide),
    "remainder.Tensor": _scalars_in_own_type(relax.op.floor_mod),
    "remainder.Scalar": _scalars_in_own_type(relax.op.floor_mod),
    "upsample_nearest2d.default": _nearest,
    "upsample_nearest2d.vec": _nearest,
    "upsample_bilinear2d.default": _bilinear,
    "upsample_bilinear2d.vec": _bilinear,
}
