"""The state after each round of pruning, in a file, so that an interrupted run can go on."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shohin.errors import ArtifactError, ShohinWarning
from shohin.ir.encodings import Encoding, Json, Sparse
from shohin.ir.program import Program, Stage, tensor_of, weight_names
from shohin.ir.serialise import content_hash, load_program, read_header, save_program
from shohin.passes.base import Context
from shohin.passes.pruning.retraining import stored_encodings
from shohin.passes.remarks import Remark, remarks_from_json, remarks_to_json


@dataclass(frozen=True, eq=False)
class Done:
    """What the rounds that were done have left.

    Attributes:
        rounds: how many were done.
        masks: what is left of the weights, by name.
        notes: the remarks of these rounds.
    """

    rounds: int = 0
    masks: Mapping[str, Tensor] | None = None
    notes: tuple[Remark, ...] = ()


class RoundFile:
    """The file that holds the state after the last round that was done.

    It is a program file, so it holds no pickle, is written whole or not at all, and is checked
    when it is read. Its name tells program, options and seed apart; data, callbacks and code
    cannot be compared, so use another folder when these change.

    Args:
        path: the file; None when nothing is kept.
        resume: whether to go on from what is there.
    """

    def __init__(self, path: Path | None, resume: bool) -> None:
        self._path = path
        self._resume = resume

    @classmethod
    def of(cls, program: Program, options: str, context: Context) -> "RoundFile":
        """The file of one run of a pass; none without a folder, or while sites are restricted."""
        if context.workdir is None or context.site_filter is not None:
            return cls(None, False)
        identity = json.dumps([content_hash(program), options, context.seed])
        key = hashlib.sha256(identity.encode()).hexdigest()
        return cls(context.workdir / f"prune-rounds-{key[:32]}.shohin", context.resume)

    def save(self, program: Program, done: Done) -> None:
        """Write the state of a program after a round.

        Raises:
            ArtifactError: when the file cannot be written.
        """
        if self._path is None:
            return
        encodings = {**stored_encodings(program), **_encodings(program, done.masks or {})}
        state = replace(program, encodings=encodings, stage=Stage.ANNOTATED)
        # As text, because a figure may be NaN, which the file's header cannot hold.
        notes = json.dumps(remarks_to_json(done.notes))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        extra: dict[str, Json] = {"rounds": done.rounds, "notes": notes}
        save_program(state, self._path, {**extra, "masks": [*(done.masks or {})]})

    def load(self, program: Program) -> Done:
        """Bring a program to the state that was saved; no rounds done where there is none.

        A file that is broken is reported with a `ShohinWarning`, and the rounds are done again.
        """
        if self._path is None or not self._resume or not self._path.exists():
            return Done()
        try:
            saved = load_program(self._path)
            extra = read_header(self._path).extra
            notes = tuple(remarks_from_json(json.loads(str(extra["notes"]))))
            names = extra["masks"]
            wanted = [str(name) for name in names] if isinstance(names, list) else []
            done = Done(int(str(extra["rounds"])), _masks(saved, wanted), notes)
        except (ArtifactError, KeyError, ValueError) as error:
            text = f"the state of the rounds is not used and they are done again: {error}"
            warnings.warn(text, ShohinWarning, stacklevel=2)
            return Done()
        copy_weights(saved, program)
        return done


def copy_weights(source: Program, program: Program) -> None:
    """Give a program the weights and statistics of another of the same graph."""
    with torch.no_grad():
        for name in weight_names(program):
            tensor_of(program.module, name).copy_(tensor_of(source.module, name))


def _encodings(program: Program, masks: Mapping[str, Tensor]) -> dict[str, Encoding]:
    return {
        name: Sparse.from_dense(tensor_of(program.module, name), mask)
        for name, mask in masks.items()
    }


def _masks(saved: Program, names: Sequence[str]) -> dict[str, Tensor]:
    found = {}
    for name in names:
        encoding = saved.encodings[name]
        if not isinstance(encoding, Sparse):
            raise ValueError(f"{name} is stored as {encoding.describe()}")
        found[name] = encoding.mask
    return found
