"""Rounds of pruning and retraining."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shohin.errors import DivergedError, ShohinWarning
from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.pools import count_left
from shohin.passes.pruning.ranking import Ranking, held_masks
from shohin.passes.pruning.retraining import Retrain, Round, retrain
from shohin.passes.pruning.state import Done, RoundFile
from shohin.passes.remarks import Reason
from shohin.passes.training import restore, snapshot

Refusals = dict[str, tuple[Reason, str]]


@dataclass(frozen=True, eq=False)
class Job:
    """What to do.

    Attributes:
        program: the program; its weights are changed in place.
        layers: every convolution and linear weight, those that are not pruned included.
        ranking: how weights are chosen.
        rounds: how often to prune, and to retrain.
        retrain: which layers are retrained together.
        adjust_dropout: whether dropout shrinks with the layers that it feeds.
        options: canonical text of the pass, which tells its runs apart.
        context: what the pass was given.
    """

    program: Program
    layers: Sequence[Candidate]
    ranking: Ranking
    rounds: int
    retrain: Retrain
    adjust_dropout: bool
    options: str
    context: Context

    @property
    def retrains(self) -> bool:
        """Whether weights are trained after they are pruned."""
        return self.retrain != "none" and self.context.train is not None


@dataclass(eq=False)
class Outcome:
    """What came of it.

    Attributes:
        masks: what is left of each weight that was pruned, by name.
        refused: why a weight was not pruned where its retraining is to blame, by name.
        trained: whether the program was trained.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    refused: Refusals = field(default_factory=dict)
    trained: bool = False


def run_rounds(job: Job) -> Outcome:
    """Prune and retrain, round by round.

    When the training gives something that is NaN or infinite, the program is brought back to what
    it was after the round before, and no further round begins.
    """
    program, context = job.program, job.context
    file = RoundFile.of(program, job.options, context) if job.retrains else RoundFile(None, False)
    outcome, done = Outcome(), file.load(program)
    outcome.masks.update(done.masks or {})
    outcome.trained = done.rounds > 0
    notes = [*done.notes]
    context.remarks.extend(notes)
    for index in range(done.rounds + 1, job.rounds + 1):
        current, known = Round(index, job.rounds), len(context.remarks)
        context.progress(index - 1, job.rounds, str(current))
        if not _run_round(job, current, outcome):
            return outcome
        notes.extend(context.remarks[known:])
        file.save(program, Done(index, outcome.masks, tuple(notes)))
    return outcome


def _run_round(job: Job, current: Round, outcome: Outcome) -> bool:
    """One round; tells whether the training stayed finite."""
    program, context = job.program, job.context
    before = snapshot(program) if job.retrains else {}
    every = {**held_masks(program, job.layers), **outcome.masks}
    share = current.index / current.of
    proposed = job.ranking.choose(program, every, share, context)
    chosen = _applicable(job, proposed, every)
    _apply(job.ranking.candidates, chosen)
    if job.retrains and chosen:
        try:
            masks = {**every, **chosen}
            order, adjust = job.retrain, job.adjust_dropout
            retrain(program, job.layers, masks, order, adjust, current, context)
        except DivergedError as error:
            restore(program, before)
            _report_divergence(job, current, error, outcome)
            return False
        outcome.trained = True
    outcome.masks.update(chosen)
    if job.retrains and chosen:
        _note(job, current, {**every, **chosen})
    elif job.retrains and job.rounds > 1:
        detail = f"{current}: there is nothing to drop, so nothing is retrained"
        context.noted("round", detail, round=current.index)
    return True


def _applicable(
    job: Job, proposed: Mapping[str, Tensor], held: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The masks that change anything and may be applied."""
    return {
        candidate.name: proposed[candidate.name]
        for candidate in job.ranking.candidates
        if candidate.name in proposed
        and int(torch.count_nonzero(proposed[candidate.name])) < count_left(candidate, held)
        and job.context.allows(candidate.node.name)
    }


def _apply(candidates: Sequence[Candidate], masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for candidate in (one for one in candidates if one.name in masks):
            candidate.weight.masked_fill_(~masks[candidate.name], 0.0)


def _note(job: Job, current: Round, masks: Mapping[str, Tensor]) -> None:
    candidates = job.ranking.candidates
    total = sum(candidate.weight.numel() for candidate in candidates)
    left = sum(count_left(candidate, masks) for candidate in candidates)
    detail = f"{current}: {left:,} of {total:,} weights left ({left / total:.1%})"
    if job.context.evaluate is None:
        job.context.noted("round", detail, round=current.index, weights=left)
        return
    accuracy = float(job.context.evaluate(job.program.module))
    text = f"{detail}, evaluation {accuracy:.4g}"
    job.context.noted("round", text, round=current.index, weights=left, evaluation=accuracy)


def _report_divergence(job: Job, current: Round, error: DivergedError, outcome: Outcome) -> None:
    kept = f"after round {current.index - 1}" if current.index > 1 else "before the pruning"
    end = ", and no further round begins" if current.index < current.of else ""
    text = f"{current}: {error.problem}; the weights are those from {kept}{end}"
    text = f"{text}; {error.hint}" if error.hint else text
    job.context.noted("diverged", text, round=current.index)
    warnings.warn(f"prune, {text}", ShohinWarning, stacklevel=2)
    for candidate in job.ranking.candidates:
        detail = f"{candidate.name} is as before, since the retraining diverged"
        outcome.refused[candidate.name] = Reason.NOT_FINITE, detail
