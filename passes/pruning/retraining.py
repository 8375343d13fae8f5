"""Retraining of what is left, with the masks held."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.program import Program, tensor_of
from shohin.ir.training import trainable
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate, is_plain
from shohin.passes.pruning.dropout import scaled_dropout
from shohin.passes.pruning.freezing import Group, members
from shohin.passes.training import check_trained, trainer_of

Retrain: TypeAlias = Literal["auto", "none", "all", "fc-conv", "conv-fc"]

# What is frozen in each stage of a retraining, in order.
_STAGES: Mapping[str, tuple[Group | None, ...]] = {
    "auto": (None,),
    "all": (None,),
    "fc-conv": ("conv", "fc"),
    "conv-fc": ("fc", "conv"),
}


@dataclass(frozen=True)
class Round:
    """One round of pruning and retraining.

    Attributes:
        index: 1 for the first.
        of: number of rounds.
    """

    index: int
    of: int

    def __str__(self) -> str:
        return f"round {self.index} of {self.of}"


def retrain(
    program: Program,
    candidates: Sequence[Candidate],
    masks: Mapping[str, Tensor],
    order: Retrain,
    adjust_dropout: bool,
    current: Round,
    context: Context,
) -> None:
    """Train a program in place through the user's `train`, with the masks held.

    Random numbers are drawn from the context's seed and the round, so that a round that is done
    again ends in the same weights. Weights that are stored in any other form than as they are, or
    sparse, are not trained.

    Args:
        program: its weights and statistics are changed.
        candidates: the convolution and linear weights.
        masks: bool tensors by weight name, those of `Sparse` encodings included.
        order: which layers train together, or one kind after the other.
        adjust_dropout: whether dropout shrinks with the layers that it feeds.
        current: which round this is.
        context: gives the training function, the seed and the progress callback.

    Raises:
        DivergedError: when the loss, where the training function looks at it, or a weight or
            statistic afterwards is NaN or infinite.
    """
    ratios = scaled_dropout(program, candidates, masks) if adjust_dropout else {}
    for index, (frozen, statistics) in enumerate(_stages(program, order)):
        held = _with_aliases(candidates, masks)
        seed = context.seed + len(_STAGES[order]) * current.index + index
        form = trainable(
            program.module,
            masks=held,
            frozen=(*frozen, *_not_plain(program)),
            frozen_statistics=statistics,
            dropout=ratios,
        )
        with form, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trainer_of(context, str(current), current.index)(program.module)
        check_trained(program, f"retraining, {current}")


def stored_encodings(program: Program) -> dict[str, Encoding]:
    """The encodings of a program whose weights were trained since they were made."""
    return {name: _stored_again(program, name) for name in program.encodings}


def _stages(program: Program, order: Retrain) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Weights and normalisations to freeze in each stage; stages with nothing to train left out."""
    groups = {group: members(program, group) for group in ("conv", "fc")}
    kinds = [group for group, found in groups.items() if found.layers]
    for group in _STAGES[order]:
        if group is None or len(kinds) < 2:
            yield (), ()
            if group is not None:
                return
        else:
            yield groups[group].weights, groups[group].norms


def _with_aliases(
    candidates: Sequence[Candidate], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    by_name = {name: candidate.name for candidate in candidates for name in candidate.names}
    return {**masks, **{a: masks[first] for a, first in by_name.items() if first in masks}}


def _not_plain(program: Program) -> list[str]:
    return [name for name, encoding in program.encodings.items() if not is_plain(encoding)]


def _stored_again(program: Program, name: str) -> Encoding:
    encoding = program.encodings[name]
    if not is_plain(encoding):
        return encoding
    weight = tensor_of(program.module, name).detach()
    if isinstance(encoding, Sparse):
        return Sparse.from_dense(weight, encoding.mask, encoding.gap_bits)
    return Dense(weight)
