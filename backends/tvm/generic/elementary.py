"""Elementary functions of float32 as polynomials, so that loops over them become SIMD."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.generic.expressions import Expr, dtype_of
from shohin.backends.tvm.kernels import vector_math

_LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SMALLEST_NORMAL = 1.17549435e-38
_LARGEST_EXPONENT = 88.7228
_SMALLEST_EXPONENT = -87.3


def _number(value: float) -> Expr:
    return tirx.const(value, "float32")


def exp(x: Expr) -> Expr:
    """E to the x, with 0 and infinity beyond the range of normal numbers."""
    infinite = tirx.Select(x > _number(_LARGEST_EXPONENT), _number(math.inf), vector_math.exp(x))
    return tirx.Select(x < _number(_SMALLEST_EXPONENT), _number(0.0), infinite)


def log(x: Expr) -> Expr:
    """Natural logarithm; relative error below 2e-7 (Cephes logf)."""
    tiny = x < _number(_SMALLEST_NORMAL)
    scaled = tirx.Select(tiny, x * _number(2.0**23), x)
    bits = tirx.reinterpret("int32", scaled)
    mantissa = tirx.reinterpret("float32", (bits & 0x7FFFFF) | 0x3F000000)
    below = mantissa < _number(math.sqrt(0.5))
    exponent = tirx.Cast("float32", (bits >> 23) - 126) - tirx.Select(
        tiny, _number(23.0), _number(0.0)
    )
    exponent = exponent - tirx.Select(below, _number(1.0), _number(0.0))
    reduced = tirx.Select(below, mantissa + mantissa, mantissa) - _number(1.0)
    variable = tirx.Var("reduced", "float32")
    result = tirx.Let(variable, reduced, _log_near_one(variable, exponent))
    result = tirx.Select(x == _number(math.inf), x, result)
    result = tirx.Select(x < _number(0.0), _number(math.nan), result)
    return tirx.Select(x == _number(0.0), _number(-math.inf), result)


def _log_near_one(x: Expr, exponent: Expr) -> Expr:
    """``log(1 + x) + exponent * log(2)``, the latter in two parts."""
    polynomial = _number(_LOG_POLYNOMIAL[0])
    for coefficient in _LOG_POLYNOMIAL[1:]:
        polynomial = polynomial * x + _number(coefficient)
    small = polynomial * x * x * x - exponent * _number(2.12194440e-4) - _number(0.5) * x * x
    return x + small + exponent * _number(0.693359375)


_POLYNOMIALS: Mapping[str, Callable[[Expr], Expr]] = {
    "exp": exp,
    "log": log,
    "erf": vector_math.erf,
    "tanh": vector_math.tanh,
    "sigmoid": vector_math.sigmoid,
}

_LIBRARY = (
    "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "hypot",
    "log1p",
)  # fmt: skip
"""What TVM leaves to libm or does not know how to lower."""

_SUFFIXES = {"float32": "f", "float64": ""}

_SQUARE_ROOT_STEPS = 4
"""Powers that are multiples of a quarter need two square roots at most."""


def expand(value: Expr) -> Expr:
    """The expression with polynomials and roots for calls into the mathematical library."""
    return tvm_ffi.structural_map(value, (ir.Call, _expand_call), order="post")


def _expand_call(call: Any) -> Expr:
    name = call.op.name.partition(".")[2] if isinstance(call.op, ir.Op) else ""
    if name in _LIBRARY and str(call.ty) in _SUFFIXES:
        symbol = name + _SUFFIXES[str(call.ty)]
        return tirx.call_pure_extern(str(call.ty), symbol, *call.args)
    if not call.args or str(call.ty) != "float32":
        return call
    if name in _POLYNOMIALS:
        return _let(call.args[0], _keep_nan(_POLYNOMIALS[name]))
    if name == "pow" and isinstance(call.args[1], tirx.FloatImm):
        return _power(call, float(call.args[1].value))
    return call


def _let(value: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """The function of a value that is computed once however often the function uses it."""
    variable = tirx.Var("value", dtype_of(value))
    return tirx.Let(variable, value, function(variable))


def _keep_nan(function: Callable[[Expr], Expr]) -> Callable[[Expr], Expr]:
    """The function, but not a number where its argument is not."""
    return lambda x: tirx.Select(tirx.isnan(x), x, _as_expression(function, x))


def _as_expression(function: Callable[[Expr], Expr], x: Expr) -> Expr:
    """What a function emits where kernels are built, as one expression: bindings become lets."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("polynomial")
        T.evaluate(function(x))
    body = builder.get().body
    *bindings, last = body.seq if isinstance(body, tirx.SeqStmt) else [body]
    result = last.value
    for binding in reversed(bindings):
        result = tirx.Let(binding.var, binding.value, result)
    return result


def _power(call: Any, exponent: float) -> Expr:
    """Powers of small multiples of a quarter as products of roots."""
    quarters = abs(exponent) * _SQUARE_ROOT_STEPS
    if quarters != int(quarters) or not 0 < quarters <= 4 * _SQUARE_ROOT_STEPS:
        return call

    def product(base: Expr) -> Expr:
        whole, rest = divmod(int(quarters), _SQUARE_ROOT_STEPS)
        factors = [base] * whole
        if rest & 2:
            factors.append(tirx.sqrt(base))
        if rest & 1:
            factors.append(tirx.sqrt(tirx.sqrt(base)))
        total = factors[0]
        for factor in factors[1:]:
            total = total * factor
        return total if exponent > 0 else tirx.const(1.0, "float32") / total

    return _let(call.args[0], product)
