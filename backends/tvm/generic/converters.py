"""Converters for the operators that TVM's importer lacks or converts wrongly.

Each takes an ATen node and TVM's importer, and gives the Relax value of the node.
"""

import math
from collections.abc import Callable
from typing import Any

from torch import fx
from tvm import ir, relax, te, tirx, topi

from shohin.backends.tvm.generic import indexing
from shohin.backends.tvm.generic.relax_values import (
    Converter,
    Importer,
    Value,
    argument,
    value_shape,
)
from shohin.backends.tvm.generic.resize import resize_bilinear, resize_nearest

_LARGEST_PRODUCT = 8


def _extreme(operator: Callable[..., Value]) -> Converter:
    """``amax`` and ``amin``: over some axes, all by default."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        axes = list(argument(node, 1, "dim", ())) or None
        keep = argument(node, 2, "keepdim", False)
        return importer.block_builder.emit(operator(importer.env[node.args[0]], axes, keep))

    return convert


def _first_index(extreme: Callable[..., Any], axis: int, keep: bool) -> Callable[[Any], Any]:
    """Index of the first extreme element along an axis, as two plain reductions."""

    def compute(data: Any) -> Any:
        best = extreme(data, axis=axis, keepdims=True)
        length = data.shape[axis]
        shape = list(data.shape)

        def position(*indices: Any) -> Any:
            hit = tirx.EQ(data(*indices), best(*indices[:axis], 0, *indices[axis + 1 :]))
            index = tirx.Cast("int64", indices[axis])
            return tirx.Select(hit, index, tirx.Cast("int64", length - 1))

        return topi.min(te.compute(shape, position), axis=axis, keepdims=keep)

    return compute


def _index_of(importer: Importer, data: Value, extreme: Any, axis: int, keep: bool) -> Value:
    axis = axis % max(len(value_shape(data)), 1)
    return importer.block_builder.emit_te(_first_index(extreme, axis, keep), data)


def _argument_of(extreme: Any) -> Converter:
    """``argmax`` and ``argmin``: over one axis, or the flattened array."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        data = importer.env[node.args[0]]
        axis = argument(node, 1, "dim")
        keep = bool(argument(node, 2, "keepdim", False))
        if axis is not None and value_shape(data):
            return _index_of(importer, data, extreme, axis, keep)
        rank = len(value_shape(data))
        size = math.prod(value_shape(data))
        flat = importer.block_builder.emit(relax.op.reshape(data, [size]))
        index = _index_of(importer, flat, extreme, 0, False)
        return importer.block_builder.emit(relax.op.reshape(index, [1] * rank if keep else []))

    return convert


def _with_index(operator: Callable[..., Value], extreme: Any) -> Converter:
    """``max`` and ``min`` along an axis: values and indices."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        data = importer.env[node.args[0]]
        axis, keep = argument(node, 1, "dim"), bool(argument(node, 2, "keepdim", False))
        best = importer.block_builder.emit(operator(data, [axis], keep))
        return best, _index_of(importer, data, extreme, axis, keep)

    return convert


def _var_mean(node: fx.Node, importer: Importer) -> Value:
    """Variance about the mean, and the mean."""
    data = importer.env[node.args[0]]
    rank = len(value_shape(data))
    axes = [axis % rank for axis in argument(node, 1, "dim") or range(rank)]
    keep = bool(node.kwargs.get("keepdim", False))
    correction = node.kwargs.get("correction")
    count = math.prod(value_shape(data)[axis] for axis in axes)
    divisor = max(count - (1.0 if correction is None else float(str(correction))), 0.0)
    emit = importer.block_builder.emit
    mean = emit(relax.op.mean(data, axes, keepdims=True))
    centred = emit(relax.op.subtract(data, mean))
    squares = emit(relax.op.sum(emit(relax.op.multiply(centred, centred)), axes, keepdims=keep))
    scale = relax.const(1.0 / divisor if divisor else math.nan, str(data.ty.dtype))
    variance = emit(relax.op.multiply(squares, scale))
    return variance, mean if keep else emit(relax.op.squeeze(mean, axes))


def _variance(node: fx.Node, importer: Importer) -> Value:
    """Variance alone."""
    return _var_mean(node, importer)[0]


def _product(node: fx.Node, importer: Importer) -> Value:
    """``prod`` along an axis."""
    data, keep = importer.env[node.args[0]], argument(node, 2, "keepdim", False)
    return importer.block_builder.emit(relax.op.prod(data, [node.args[1]], keep))


def _power(node: fx.Node, importer: Importer) -> Value:
    """``pow`` by a constant: products for small whole exponents, which integers need too."""
    exponent: Any = node.args[1]
    [data] = _promoted(node, importer)[:1]
    if exponent not in range(1, _LARGEST_PRODUCT + 1):
        power = relax.const(exponent, str(data.ty.dtype))
        return importer.block_builder.emit(relax.op.power(data, power))
    return importer.block_builder.emit_te(_product_of_equals(int(exponent)), data)


def _clamp(node: fx.Node, importer: Importer) -> Value:
    """``clamp`` by constants, infinite ones included."""
    emit = importer.block_builder.emit
    data = importer.env[node.args[0]]
    dtype = str(importer._convert_data_type(node.meta["val"].dtype))
    data = _in_type(importer, data, dtype)
    bounds = (argument(node, 1, "min"), argument(node, 2, "max"))
    for operator, bound in zip((relax.op.maximum, relax.op.minimum), bounds, strict=True):
        if bound is not None and math.isfinite(bound):
            data = emit(operator(data, relax.const(bound, dtype)))
    return data


def _exp2(node: fx.Node, importer: Importer) -> Value:
    """Two to the x."""
    data = importer.env[node.args[0]]
    scale = relax.const(math.log(2.0), str(data.ty.dtype))
    emit = importer.block_builder.emit
    return emit(relax.op.exp(emit(relax.op.multiply(data, scale))))


def _product_of_equals(count: int) -> Callable[[Any], Any]:
    def compute(data: Any) -> Any:
        def element(*indices: Any) -> Any:
            total = data(*indices)
            for _ in range(count - 1):
                total = total * data(*indices)
            return total

        return te.compute(data.shape, element, name="power")

    return compute


def _scan(operator: Callable[..., Any]) -> Converter:
    """``cumsum`` and ``cumprod``."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        data = importer.env[node.args[0]]
        axis = argument(node, 1, "dim") % len(value_shape(data))
        dtype = str(importer._convert_data_type(node.meta["val"].dtype))
        return importer.block_builder.emit_te(operator, data, axis, dtype)

    return convert


def _promoting(operator: Callable[..., Value]) -> Converter:
    """A binary operator whose operands take the type that torch promotes them to."""

    def convert(node: fx.Node, importer: Importer) -> Value:
        return importer.block_builder.emit(operator(*_promoted(node, importer)))

    return convert


def _promoted(node: fx.Node, importer: Importer) -> list[Value]:
    """The two operands in the type of the result."""
    dtype = str(importer._convert_data_type(node.meta["val"].dtype))
    operands = [importer.env[a] if isinstance(a, fx.Node) else a for a in node.args[:2]]
    return [_in_type(importer, operand, dtype) for operand in operands]


def _in_type(importer: Importer, operand: Any, dtype: str) -> Value:
    if not isinstance(operand, ir.Expr):
        return relax.const(operand, dtype)
    if str(operand.ty.dtype) == dtype:
        return operand
    return importer.block_builder.emit(relax.op.astype(operand, dtype))


def _divide(node: fx.Node, importer: Importer) -> Value:
    """``div`` with a rounding mode."""
    mode = node.kwargs.get("rounding_mode")
    if mode != "trunc":
        operator = relax.op.floor_divide if mode == "floor" else relax.op.divide
        return _promoting(operator)(node, importer)
    left, right = _promoted(node, importer)
    emit = importer.block_builder.emit
    if node.meta["val"].dtype.is_floating_point:
        return emit(relax.op.trunc(emit(relax.op.divide(left, right))))
    return importer.block_builder.emit_te(topi.divide, left, right)


CONVERTERS: dict[str, Converter] = {
    "amax.default": _extreme(relax.op.max),
    "amin.default": _extreme(relax.op.min),
    "argmax.default": _argument_of(topi.max),
    "argmin.default": _argument_of(topi.min),
    "max.dim": _with_index(relax.op.max, topi.max),
    "min.dim": _with_index(relax.op.min, topi.min),
    "embedding.default": indexing.embedding,
    "select.int": indexing.select,
    "index.Tensor": indexing.index,
    "_unsafe_index.Tensor": indexing.index,
    "index_select.default": indexing.index_select,
    "clamp.default": _clamp,
    "exp2.default": _exp2,
    "pow.Tensor_Scalar": _power,
    "prod.dim_int": _product,
    "var_mean.correction": _var_mean,
    "var.correction": _variance,
    "cumsum.default": _scan(topi.cumsum),
    "cumprod.default": _scan(topi.cumprod),
    "div.Tensor_mode": _divide,
    "div.Scalar_mode": _divide,
    "div.Tensor": _promoting(relax.op.divide),
    "div.Scalar": _promoting(relax.op.divide),
    "floor_divide.default": _promoting(relax.op.floor_divide),
    "remainder.Tensor": _promoting(relax.op.floor_mod),
    "remainder.Scalar": _promoting(relax.op.floor_mod),
    "upsample_nearest2d.default": resize_nearest,
    "upsample_nearest2d.vec": resize_nearest,
    "upsample_bilinear2d.default": resize_bilinear,
    "upsample_bilinear2d.vec": resize_bilinear,
}
