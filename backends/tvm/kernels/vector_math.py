"""Elementary functions as vector polynomials, so that they run in SIMD and need no libm.

Each takes and returns a TIR expression of any lane count, to be called where a kernel's code is
emitted. What is used more than once is bound to a variable: as a tree, the expression of two
functions in a row would be hundreds of times as large. Errors are stated in the docstrings; the
tests hold them to it.
"""

import math
from collections.abc import Sequence

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import Expr, number, splat

_ERF_P = (
    -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
    -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02,
)  # fmt: skip
_ERF_Q = (
    -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
    -1.42647390514189e-02,
)  # fmt: skip
_TANH_P = (
    -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
    1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03,
)  # fmt: skip
_TANH_Q = (
    1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03,
)  # fmt: skip
_EXP_POLY = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1,
)  # fmt: skip


def lanes_of(value: Expr) -> int:
    """Number of lanes of an expression, from its type's text (``float32x16``)."""
    _, _, lanes = str(value.ty.dtype if hasattr(value.ty, "dtype") else value.dtype).partition("x")
    return int(lanes) if lanes else 1


def _horner(coefficients: Sequence[float], x: Expr, lanes: int) -> Expr:
    total = number(coefficients[0], lanes)
    for coefficient in coefficients[1:]:
        total = total * x + number(coefficient, lanes)
    return total


def _integer_type(lanes: int) -> str:
    return f"int32x{lanes}" if lanes > 1 else "int32"


def _float_type(lanes: int) -> str:
    return f"float32x{lanes}" if lanes > 1 else "float32"


def at_least(x: Expr, low: Expr) -> Expr:
    """The larger of the two; NaN where x is NaN, as in PyTorch.

    TVM's maximum gives its second operand when either is NaN, so the order matters.
    """
    return T.max(low, x)


def at_most(x: Expr, high: Expr) -> Expr:
    """The smaller of the two; NaN where x is NaN."""
    return T.min(high, x)


def clamp(x: Expr, low: float, high: float) -> Expr:
    """``min(max(x, low), high)``; an infinite bound is none, and NaN stays NaN."""
    lanes = lanes_of(x)
    bounded = x if math.isinf(low) else at_least(x, number(low, lanes))
    return bounded if math.isinf(high) else at_most(bounded, number(high, lanes))


def exp(x: Expr) -> Expr:
    """E to the x; relative error below 2e-7 for x from -87.3 to 88.3 (Cephes expf).

    Further out the result is that of the nearer end: 1.2e-38 or 2.2e38.
    """
    lanes = lanes_of(x)
    x = T.bind(clamp(x, -87.3, 88.3))
    n = T.bind(T.floor(x * number(1.44269504088896341, lanes) + number(0.5, lanes)))
    r = T.bind(x - n * number(0.693359375, lanes) - n * number(-2.12194440e-4, lanes))
    p = _horner(_EXP_POLY, r, lanes) * r * r + r + number(1.0, lanes)
    exponent = T.cast(n, _integer_type(lanes)) + splat(T.int32(127), lanes)
    power = T.reinterpret(_float_type(lanes), T.shift_left(exponent, splat(T.int32(23), lanes)))
    return p * power


def erf(x: Expr) -> Expr:
    """Error function; absolute error below 5e-7 (rational approximation of Eigen and XLA)."""
    lanes = lanes_of(x)
    x = T.bind(clamp(x, -4.0, 4.0))
    square = T.bind(x * x)
    return x * _horner(_ERF_P, square, lanes) / _horner(_ERF_Q, square, lanes)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent; relative error below 1e-6 (rational approximation of Eigen)."""
    lanes = lanes_of(x)
    x = T.bind(clamp(x, -7.90531110763549805, 7.90531110763549805))
    square = T.bind(x * x)
    return x * _horner(_TANH_P, square, lanes) / _horner(_TANH_Q, square, lanes)


def sigmoid(x: Expr) -> Expr:
    """``1 / (1 + exp(-x))``; relative error below 5e-7."""
    lanes = lanes_of(x)
    one = number(1.0, lanes)
    return one / (one + exp(number(0.0, lanes) - x))


def gelu(x: Expr) -> Expr:
    """``x * (1 + erf(x / sqrt 2)) / 2``."""
    lanes = lanes_of(x)
    half = number(0.5, lanes)
    return x * (half + half * erf(x * number(0.70710678118654752, lanes)))


def gelu_tanh(x: Expr) -> Expr:
    """The tanh form of GELU (Hendrycks and Gimpel 2016, equation in section 2)."""
    lanes = lanes_of(x)
    half = number(0.5, lanes)
    inner = number(0.79788456080286536, lanes) * (x + number(0.044715, lanes) * x * x * x)
    return x * (half + half * tanh(inner))
