"""Elementary functions of float32 as polynomials, so that loops over them become SIMD."""

from collections.abc import Callable, Mapping
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from shohin.backends.tvm.generic.expressions import Expr, dtype_of
from shohin.backends.tvm.kernels import vector_math

_POLYNOMIALS: Mapping[str, Callable[[Expr], Expr]] = {
    "exp": vector_math.exp,
    "erf": vector_math.erf,
    "tanh": vector_math.tanh,
    "sigmoid": vector_math.sigmoid,
}

_SQUARE_ROOT_STEPS = 4
"""Powers that are multiples of a quarter need two square roots at most."""


def expand(value: Expr) -> Expr:
    """The expression with polynomials and roots for calls into the mathematical library."""
    return tvm_ffi.structural_map(value, (ir.Call, _expand_call), order="post")


def _expand_call(call: Any) -> Expr:
    name = call.op.name.partition(".")[2] if isinstance(call.op, ir.Op) else ""
    if not call.args or str(call.ty) != "float32":
        return call
    if name in _POLYNOMIALS:
        return _let(call.args[0], _POLYNOMIALS[name])
    if name == "pow" and isinstance(call.args[1], tirx.FloatImm):
        return _power(call, float(call.args[1].value))
    return call


def _let(value: Expr, function: Callable[[Expr], Expr]) -> Expr:
    """The function of a value that is computed once however often the function uses it."""
    variable = tirx.Var("value", dtype_of(value))
    return tirx.Let(variable, value, function(variable))


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
