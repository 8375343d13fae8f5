"""The pruned program, and a remark on each of its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import Program, Stage, encoding_of
from shohin.passes.analyses.cost import cost
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.pools import count_left
from shohin.passes.pruning.retraining import stored_encodings
from shohin.passes.pruning.rounds import Refusals
from shohin.passes.pruning.units import Units
from shohin.passes.remarks import NodeCost, Reason


def encoded(
    program: Program, candidates: Sequence[Candidate], masks: Mapping[str, Tensor]
) -> Program:
    """A program whose weights were pruned, with encodings that say so.

    Args:
        program: the program; its weights are zero outside of the masks.
        candidates: the weights that may have been pruned.
        masks: what is left of those that were, by name.
    """
    encodings = stored_encodings(program)
    for candidate in (one for one in candidates if one.name in masks):
        sparse: Encoding = Sparse.from_dense(candidate.weight, masks[candidate.name])
        encodings |= dict.fromkeys(candidate.names, sparse)
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def remark_layers(
    before: Program,
    after: Program,
    pruned: Sequence[Units],
    held: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    refused: Refusals,
    context: Context,
) -> None:
    """Remark on each layer that was pruned, with its costs, and on each that was not, with why.

    Args:
        before: the program with its encodings from before.
        after: the program with its encodings from afterwards.
        pruned: the units of the weights that may have been pruned.
        held: what was left of them before, by name.
        masks: what is left of those that were pruned, by name.
        refused: why weights were not pruned where only the rounds know, by name.
        context: where the remarks go.
    """
    for units in pruned:
        candidate = units.candidate
        if candidate.name in masks:
            kept = count_left(candidate, masks)
            _remark_pruned(before, after, candidate, count_left(candidate, held), kept, context)
        else:
            reason = _reason(units, held, context)
            context.skipped(candidate.node, *refused.get(candidate.name, reason))


def _reason(units: Units, held: Mapping[str, Tensor], context: Context) -> tuple[Reason, str]:
    candidate = units.candidate
    if not context.allows(candidate.node.name):
        return Reason.EXCLUDED_BY_OPTION, f"{candidate.name} may not be changed"
    if units.count == 1:
        detail = f"{candidate.name} is a single unit of pruning, and of each weight one is kept"
        return Reason.TOO_SMALL, detail
    left, total = count_left(candidate, held), candidate.weight.numel()
    return Reason.NOT_APPLICABLE, f"{candidate.name} has {left} of {total} left"


def _remark_pruned(
    before: Program,
    after: Program,
    candidate: Candidate,
    left: int,
    kept: int,
    context: Context,
) -> None:
    name, node, total = candidate.name, candidate.node, candidate.weight.numel()
    spent = context.analyses.get(cost, before).nodes[node.name]
    stored = encoding_of(after, name).stored_bytes() - encoding_of(before, name).stored_bytes()
    context.changed(
        node,
        "pruned",
        f"{name}: {kept} of {total} elements kept",
        before=spent.for_remark(),
        after=NodeCost(
            spent.nonzeros - left + kept, spent.macs * kept // total, spent.stored_bytes + stored
        ),
    )
