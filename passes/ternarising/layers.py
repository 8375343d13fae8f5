"""Which weights become ternary, and from what they start."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from shohin.ir.encodings import Dense
from shohin.ir.program import Program, encoding_of
from shohin.ir.ternarising import Start, Threshold, Zeros, ternary_codes
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import (
    Candidate,
    gives_outputs,
    is_excluded,
    obstacle,
    reads_inputs,
)
from shohin.passes.remarks import Reason

StartScales: TypeAlias = Literal["means", "ones", "fitted"]


@dataclass(frozen=True)
class Choice:
    """Which layers are left as they are.

    Attributes:
        exclude: names of weights, or shell patterns.
        keep_first: whether those that read inputs of the program are.
        keep_last: whether those that give outputs of the program are.
    """

    exclude: Sequence[str]
    keep_first: bool
    keep_last: bool


def usable_layers(
    program: Program, candidates: Sequence[Candidate], choice: Choice, context: Context
) -> list[Candidate]:
    """The weights that can become ternary; a remark says why others cannot."""
    return [one for one in candidates if _is_usable(program, one, choice, context)]


def start_of(candidate: Candidate, zeros: Zeros, scales: StartScales) -> Start:
    """Where the training of a weight starts.

    With ``ones`` the unit is 1, as in the authors' script. Else it is the mean absolute weight
    among those that are not zero, which makes the ternary weight about what the weight was.

    Args:
        candidate: of a weight that `usable_layers` gave.
        zeros: which elements are zero.
        scales: which of the two.
    """
    if scales == "ones":
        return Start(zeros, 1.0)
    weight = candidate.weight.detach()
    kept = weight[ternary_codes(weight, zeros) != 0]
    return Start(zeros, float(kept.double().abs().mean()))


def without_survivors(
    candidates: Sequence[Candidate], zeros: Sequence[Zeros], context: Context
) -> Iterator[bool]:
    """By weight, whether everything would be zero, so that it cannot be ternary."""
    for candidate, rule in zip(candidates, zeros, strict=True):
        none_left = not bool(ternary_codes(candidate.weight.detach(), rule).any())
        if none_left:
            kind = "threshold" if isinstance(rule, Threshold) else "sparsity"
            detail = f"{candidate.name}: a {kind} of {rule.share:g} leaves no element"
            context.skipped(candidate.node, Reason.NOT_APPLICABLE, detail)
        yield none_left


def _is_usable(program: Program, candidate: Candidate, choice: Choice, context: Context) -> bool:
    if is_excluded(candidate, choice.exclude, context):
        return False
    if not context.allows(candidate.node.name):
        detail = f"{candidate.name} may not be changed"
        context.skipped(candidate.node, Reason.EXCLUDED_BY_OPTION, detail)
        return False
    found = obstacle(program, candidate) or _own_obstacle(program, candidate, choice)
    if found is not None:
        context.skipped(candidate.node, *found)
    return found is None


def _own_obstacle(
    program: Program, candidate: Candidate, choice: Choice
) -> tuple[Reason, str] | None:
    name, weight = candidate.name, candidate.weight.detach()
    if choice.keep_first and reads_inputs(program, candidate):
        detail = f"{name} reads inputs of the program; keep_first=false makes it ternary, too"
        return Reason.EXCLUDED_BY_OPTION, detail
    if choice.keep_last and gives_outputs(program, candidate):
        detail = f"{name} gives outputs of the program; keep_last=false makes it ternary, too"
        return Reason.EXCLUDED_BY_OPTION, detail
    held = encoding_of(program, name)
    if not isinstance(held, Dense):
        return Reason.ALREADY_ENCODED, f"{name} is stored as {held.describe()}"
    if not bool(weight.any()):
        return Reason.NOT_APPLICABLE, f"{name} is all zeros, which no threshold divides"
    largest = float(weight.abs().amax())
    if largest > torch.finfo(torch.float32).max or not math.isfinite(largest):
        return Reason.NOT_APPLICABLE, f"{name} has elements beyond single precision"
    return None
