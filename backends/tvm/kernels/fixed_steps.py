"""Steps of fixed-point results, on integers that are still in registers.

| kind | constants | result |
|---|---|---|
| ``fixed-rescale`` | shift, low, high, nearest | shifted to the right, rounded, saturated |
| ``fixed-rescale`` with an operand | low, high, nearest | the same, one shift a channel |
| ``fixed-add`` | left, left of the operand, shift, low, high, nearest | sum of both, aligned |
| ``fixed-multiply`` | shift, low, high, nearest | product with the operand |
| ``fixed-relu`` | | ``max(x, 0)`` |
| ``fixed-real`` | fraction | the number, ``x * 2**-fraction`` in single precision |
| ``fixed-round`` | fraction, low, high, nearest | the integer of a number in single precision |

`nearest` is 1 for the nearest integer, ties to even, and 0 for the next lower one. Sums may have 32
or 64 bits before they are rescaled; integers have 32 afterwards.
"""

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import Expr, number, splat

PREFIX = "fixed-"
_WORD = 32
_MOST_LEFT = 15
"""Of results of at most 16 bits: further to the left, all but 0 is out of range anyway."""
_MOST_RIGHT = {32: 31, 64: 62}
"""Sums are 32 bits wide only if the halves that they are rounded with fit as well, which leaves
shifts below 32; those of 64 bits are so much smaller that a shift further changes nothing."""


def apply_fixed_step(
    kind: str, constants: tuple[float, ...], x: Expr, operand: Expr | None, lanes: int
) -> Expr:
    """The step's result.

    Args:
        kind: of the table above.
        constants: its numbers.
        x: int32 or int64 lanes; float32 for ``fixed-round``.
        operand: the second operand's lanes, any integers.
        lanes: how many.
    """
    if kind == "fixed-relu":
        return T.max(x, _constant(0, x, lanes))
    if kind == "fixed-real":
        real = T.cast(x, _type("float32", lanes))
        return real * number(2.0 ** -constants[0], lanes)
    numbers = [int(one) for one in constants]
    if kind == "fixed-round":
        return _rounded(x, *numbers, lanes=lanes)
    if kind == "fixed-rescale" and operand is not None:
        low, high, nearest = numbers
        moved = _shifted_each(x, operand, (low, high), bool(nearest), lanes)
        return _narrowed(_clamped(moved, low, high, lanes), lanes)
    *before, shift, low, high, nearest = numbers
    if kind == "fixed-add":
        x = _sum(x, operand, before, lanes)
    if kind == "fixed-multiply":
        x = x * T.cast(operand, _type("int32", lanes))
    moved = _shifted(x, shift, (low, high), bool(nearest), lanes)
    return _narrowed(_clamped(moved, low, high, lanes), lanes)


def _rounded(x: Expr, fraction: int, low: int, high: int, nearest: int, *, lanes: int) -> Expr:
    """Integers of real numbers; NaN gives 0."""
    scaled = T.bind(x * number(2.0**fraction, lanes))
    # Limits first: what is beyond them has no integer. They are whole, so rounding keeps them.
    least, most = number(float(low), lanes), number(float(high), lanes)
    above, below = T.bind(T.max(scaled, least)), T.bind(T.min(scaled, most))
    # Both give their second operand where the first is NaN; a comparison of a number with itself
    # would be taken for true.
    is_nan = T.And(above == least, below == most)
    kept = T.Select(is_nan, number(0.0, lanes), T.min(above, most))
    rounded = T.nearbyint(kept) if nearest else T.floor(kept)
    if not nearest and fraction < 0:
        # The product of a tiny negative number is rounded to zero; the next lower integer is not.
        zero = number(0.0, lanes)
        rounded = T.Select(T.And(kept == zero, x < zero), number(-1.0, lanes), rounded)
    return T.cast(rounded, _type("int32", lanes))


def _sum(x: Expr, operand: Expr | None, left: list[int], lanes: int) -> Expr:
    wide = max(left) > _MOST_LEFT
    kind = _type("int64" if wide else "int32", lanes)
    one, two = T.cast(x, kind), T.cast(operand, kind)
    parts = [
        T.shift_left(part, _constant(by, part, lanes)) if by else part
        for part, by in zip((one, two), left, strict=True)
    ]
    return parts[0] + parts[1]


def _shifted(x: Expr, shift: int, limits: tuple[int, int], nearest: bool, lanes: int) -> Expr:
    if shift == 0:
        return x
    if shift < 0:
        left = min(-shift, _most_left(limits))
        return T.shift_left(_clamped(x, *limits, lanes), _constant(left, x, lanes))
    width = _bits_of(x)
    if shift >= width:
        # No integer of that width reaches a half.
        return _constant(0, x, lanes) if nearest else _right(x, width - 1, lanes)
    if not nearest:
        return _right(x, shift, lanes)
    odd = T.bitwise_and(_right(x, shift, lanes), _constant(1, x, lanes))
    below_half = _constant((1 << (shift - 1)) - 1, x, lanes)
    return _right(x + below_half + odd, shift, lanes)


def _most_left(limits: tuple[int, int]) -> int:
    """The furthest shift to the left of a number within the limits of a result.

    What is further would be beyond them. Results of 32 bits have a format in which no sum is.
    """
    return _WORD - 1 if _is_word(limits) else _MOST_LEFT


def _is_word(limits: tuple[int, int]) -> bool:
    return limits == (-(1 << (_WORD - 1)), (1 << (_WORD - 1)) - 1)


def _shifted_each(
    x: Expr, shifts: Expr, limits: tuple[int, int], nearest: bool, lanes: int
) -> Expr:
    """Every lane shifted by a number of its own."""
    amounts = T.bind(T.cast(shifts, _type(f"int{_bits_of(x)}", lanes)))
    zero, one = _constant(0, x, lanes), _constant(1, x, lanes)
    most = _constant(_MOST_RIGHT[_bits_of(x)], x, lanes)
    right = T.bind(T.min(T.max(amounts, one), most))
    moved = T.shift_right(x, right)
    if nearest:
        below_half = T.shift_left(one, right - one) - one
        moved = T.shift_right(x + below_half + T.bitwise_and(moved, one), right)
    left = T.min(T.max(zero - amounts, zero), _constant(_most_left(limits), x, lanes))
    return T.Select(amounts > zero, moved, T.shift_left(_clamped(x, *limits, lanes), left))


def _right(x: Expr, shift: int, lanes: int) -> Expr:
    return T.shift_right(x, _constant(shift, x, lanes))


def _clamped(x: Expr, low: int, high: int, lanes: int) -> Expr:
    if _is_word((low, high)) and _bits_of(x) == _WORD:
        return x
    return T.min(T.max(x, _constant(low, x, lanes)), _constant(high, x, lanes))


def _narrowed(x: Expr, lanes: int) -> Expr:
    return x if _bits_of(x) == _WORD else T.cast(x, _type("int32", lanes))


def element_type(value: Expr) -> str:
    """Type of the elements of an expression (``int32`` of ``int32x16``)."""
    text = str(value.ty.dtype if hasattr(value.ty, "dtype") else value.dtype)
    return text.partition("x")[0]


def _bits_of(value: Expr) -> int:
    return int(element_type(value).removeprefix("int"))


def _constant(value: int, like: Expr, lanes: int) -> Expr:
    made = T.int64(value) if element_type(like) == "int64" else T.int32(value)
    return splat(made, lanes)


def _type(element: str, lanes: int) -> str:
    return f"{element}x{lanes}" if lanes > 1 else element
