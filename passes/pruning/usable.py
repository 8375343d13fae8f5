"""Which convolution and linear weights can be pruned as asked; remarks say why the others stay."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from shohin.errors import UnsupportedError
from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate, gives_outputs, is_excluded, obstacle
from shohin.passes.pruning.obd import unsupported_weights
from shohin.passes.pruning.ranking import Method
from shohin.passes.pruning.reconstruction import unsupported
from shohin.passes.pruning.units import Granularity
from shohin.passes.remarks import Reason

_Reasons = dict[str, tuple[Reason, str]]


@dataclass(frozen=True)
class Limits:
    """What the options ask of a weight.

    Attributes:
        method: how weights are ranked.
        granularity: what is kept or dropped as one.
        exclude: names or shell patterns to leave out.
        named: names that have a density of their own, patterns left out.
    """

    method: Method
    granularity: Granularity
    exclude: tuple[str, ...]
    named: Collection[str]


def find_usable(
    program: Program, layers: Sequence[Candidate], limits: Limits, context: Context
) -> list[Candidate]:
    """The weights that can be pruned, with a remark on each of the others.

    Raises:
        UnsupportedError: when the method can rank none of those that are left.
    """
    found = [one for one in layers if not is_excluded(one, limits.exclude, context)]
    reasons = {
        one.name: reason for one in found if (reason := _obstacle(program, one, limits)) is not None
    }
    left = [one for one in found if one.name not in reasons]
    unranked = _unranked(program, left, limits.method, context)
    if unranked and len(unranked) == len(left):
        problem = f"'{limits.method}' can rank none of the weights: {unranked[left[0].name][1]}"
        raise UnsupportedError("prune method", problem, "choose method=magnitude")
    reasons |= unranked
    for candidate in (one for one in found if one.name in reasons):
        context.skipped(candidate.node, *reasons[candidate.name])
    return [one for one in left if one.name not in unranked]


def _obstacle(program: Program, candidate: Candidate, limits: Limits) -> tuple[Reason, str] | None:
    found = obstacle(program, candidate)
    if found is not None or limits.granularity == "element":
        return found
    if candidate.grouped:
        return Reason.NOT_APPLICABLE, "grouped convolutions are pruned by element only"
    named = any(name in limits.named for name in candidate.spellings)
    if limits.granularity == "channel" and not named and gives_outputs(program, candidate):
        detail = f"channels of {candidate.name} are outputs of the program; only a density for"
        return Reason.NOT_APPLICABLE, f"{detail} '{candidate.name}' in 'densities' prunes them"
    return None


def _unranked(
    program: Program, candidates: Sequence[Candidate], method: Method, context: Context
) -> _Reasons:
    """Why the method cannot rank weights, by name."""
    if method == "obs":
        found = {one.name: unsupported(program, one) for one in candidates}
        return {name: reason for name, reason in found.items() if reason is not None}
    if method == "obd":
        names = [candidate.name for candidate in candidates]
        errors = unsupported_weights(program, names, context.calibration)
        return {
            name: (
                Reason.UNSUPPORTED_OPERATOR,
                f"{name} lies before {error.where}: {error.problem}",
            )
            for name, error in errors.items()
        }
    return {}
