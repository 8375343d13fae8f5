"""What holds of fixed-point operators: formats are where they are needed, and numbers fit them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.fixed_ops import FIXED_OPERATORS, fixed_conv2d, fixed_linear, fixed_quantize
from shohin.ir.program import Program, tensor_of

_WEIGHTED = frozenset({fixed_conv2d, fixed_linear})

Problem = tuple[str, str]
"""What was expected, and what was found."""


def fixed_problems(program: Program) -> Iterator[tuple[fx.Node, Problem]]:
    """The fixed-point operators at which something does not hold."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in FIXED_OPERATORS:
            found = _format_problem(node) or _operand_problem(node)
            if found is None and node.target in _WEIGHTED:
                found = _weight_problem(program, node)
            if found is not None:
                yield node, found


def _format_problem(node: fx.Node) -> Problem | None:
    """The annotation says the same as the arguments."""
    carried = annotation(node, ActivationFormat)
    given = ActivationFormat(_argument(node, "bits"), _argument(node, "fraction"))
    if carried != given:
        return f"the format {_text(given)} of its arguments", _text(carried)
    return None


def _operand_problem(node: fx.Node) -> Problem | None:
    """Feature maps that it reads have formats; only a rounding may read real numbers."""
    for name in ("input", "other"):
        operand = _argument(node, name)
        if not isinstance(operand, fx.Node) or node.target is fixed_quantize:
            continue
        carried = annotation(operand, ActivationFormat)
        if carried is None:
            return f"a format of '{operand.name}'", "none"
        fraction = _argument(node, "input_fraction")
        if node.target in _WEIGHTED and carried.fraction != fraction:
            expected = f"the fraction {carried.fraction} of '{operand.name}'"
            return expected, f"input_fraction={fraction}"
    return None


def _weight_problem(program: Program, node: fx.Node) -> Problem | None:
    """Weights and biases lie on their grids."""
    fractions = torch.tensor(_argument(node, "weight_fractions")).double()
    weight, bias = _argument(node, "weight"), _argument(node, "bias")
    values = _tensor(program, weight)
    if values is None:
        return "a weight of the module", str(weight)
    if len(fractions) not in (1, len(values)):
        return f"1 weight fraction or {len(values)}", str(len(fractions))
    rows = fractions.reshape(-1, *[1] * (values.dim() - 1))
    if not _is_whole(values, rows):
        return f"'{weight.target}' on its grid", "other numbers"
    added = _tensor(program, bias)
    if added is not None and not _is_whole(added, fractions + _argument(node, "input_fraction")):
        return f"'{bias.target}' on the grid of the products", "other numbers"
    return None


def _is_whole(values: Tensor, fractions: Tensor) -> bool:
    scaled = values.detach().double() * 2.0**fractions
    return bool((scaled == scaled.round()).all())


def _tensor(program: Program, node: object) -> Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    return tensor_of(program.module, str(node.target))


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of an operator, however it is given."""
    target: Any = node.target
    if name in node.kwargs:
        return node.kwargs[name]
    for place, declared in enumerate(target._schema.arguments):
        if declared.name == name:
            return node.args[place] if place < len(node.args) else declared.default_value
    return None


def _text(carried: ActivationFormat | None) -> str:
    return "none" if carried is None else f"<{carried.bits} bits, fraction {carried.fraction}>"
