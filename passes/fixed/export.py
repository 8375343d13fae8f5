"""The integers' formats of a fixed-point program, for those who build hardware for them."""

from typing import Any

from torch import fx

from shohin.ir.annotations import ActivationFormat, Origin, annotation
from shohin.ir.encodings import Json
from shohin.ir.fixed_ops import (
    FIXED_OPERATORS,
    fixed_add,
    fixed_average_pool2d,
    fixed_conv2d,
    fixed_linear,
    fixed_multiply,
    fixed_quantize,
)
from shohin.ir.program import Program
from shohin.passes.patterns import argument, weight_name

_NAMES = {
    fixed_quantize: "quantize",
    fixed_conv2d: "convolution",
    fixed_linear: "linear",
    fixed_add: "add",
    fixed_multiply: "multiply",
    fixed_average_pool2d: "average",
}


def formats_of(program: Program) -> list[Json]:
    """What every fixed-point operator reads, gives and shifts by, in graph order.

    ``value = integer * 2**-fraction``. An operator computes its exact result at the radix of its
    operands and moves it by `shift` bits to the right (to the left where that is negative), rounds
    and saturates. Shifts of a convolution or linear map are one, or one for each output.

    Returns:
        Objects with `node`, `module`, `operator`, `rounding`, `inputs` and `output` (each with
        `bits` and `fraction`), `shift`, and for layers `weight` and `bias` (their names in the
        program file, and fractions), for averages `multiplier`. Empty for a float program.
    """
    return [_describe(node) for node in program.graph.nodes if node.target in FIXED_OPERATORS]


def _describe(node: fx.Node) -> Json:
    origin, made = annotation(node, Origin), annotation(node, ActivationFormat)
    names = [name for name in ("input", "other") if isinstance(argument(node, name), fx.Node)]
    operands = [annotation(argument(node, name), ActivationFormat) for name in names]
    inputs: list[Json] = [_format(one) for one in operands]
    found: dict[str, Json] = {
        "node": node.name,
        "module": origin.module if origin is not None else "",
        "operator": _NAMES[node.target],
        "rounding": str(argument(node, "rounding")),
        "inputs": inputs,
        "output": _format(made),
    }
    if made is not None and all(one is not None for one in operands):
        fractions = [one.fraction for one in operands if one is not None]
        found |= _shifts(node, fractions, made)
    return found


def _shifts(node: fx.Node, fractions: list[int], made: ActivationFormat) -> dict[str, Json]:
    if node.target in (fixed_conv2d, fixed_linear):
        return _layer(node, fractions[0], made)
    if node.target == fixed_average_pool2d:
        radix = fractions[0] + argument(node, "shift")
        return {"multiplier": argument(node, "multiplier"), "shift": radix - made.fraction}
    radix = sum(fractions) if node.target == fixed_multiply else max(fractions)
    return {"shift": radix - made.fraction}


def _layer(node: fx.Node, fraction: int, made: ActivationFormat) -> dict[str, Json]:
    weights = [int(one) for one in argument(node, "weight_fractions")]
    radix = [one + fraction for one in weights]
    shifts = [one - made.fraction for one in radix]
    bias = weight_name(argument(node, "bias"))
    found: dict[str, Json] = {
        "weight": {"name": weight_name(argument(node, "weight")), "fraction": _one(weights)},
        "shift": _one(shifts),
    }
    if bias is not None:
        found["bias"] = {"name": bias, "fraction": _one(radix)}
    return found


def _one(numbers: list[int]) -> Json:
    """The number that all are, or the list of them."""
    found: list[Any] = [*numbers]
    return found[0] if len(set(numbers)) == 1 else found


def _format(carried: ActivationFormat | None) -> Json:
    return None if carried is None else {"bits": carried.bits, "fraction": carried.fraction}
