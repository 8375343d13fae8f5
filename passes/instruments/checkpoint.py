"""Saves the program after every pass, and goes on from there after an interruption."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from shohin.errors import ArtifactError, ShohinWarning
from shohin.ir.encodings import Json
from shohin.ir.serialise import content_hash, load_program, read_header, save_program
from shohin.passes.base import Pass
from shohin.passes.instruments.base import Instrument, PassEnd, PipelineEvent, ResumePoint
from shohin.passes.instruments.drift import Drift, PassDrift, drifts_from_json, drifts_to_json
from shohin.passes.pipeline import format_pass
from shohin.passes.remarks import remarks_from_json, remarks_to_json

_REMARKS = "remarks"
_DRIFTS = "drifts"
_SAMPLE = "drift_sample"


class CheckpointWarning(ShohinWarning):
    """A checkpoint could not be used, and its pass runs again."""


class Checkpoint(Instrument):
    """Writes a checkpoint after every pass and resumes from the furthest one that fits.

    A checkpoint is a program file that also holds the remarks and the drifts. It fits when it was
    made from the same program (content hash), by the same first passes with the same options, with
    the same seed. Calibration data, callbacks and the code of the passes cannot be compared: use
    another folder when these change.

    Files that are not checkpoints of this very run are neither read nor removed, so that several
    runs can share a folder. A checkpoint that is corrupt is reported with a `CheckpointWarning`
    and made anew. Nothing is read or written while the context restricts passes to some sites.

    Args:
        folder: where the files go; made when it is missing.
        resume: whether to go on from what is there; otherwise checkpoints are only written.
        drift: what measures drift, to be called before this. Its figures are saved, and restored
            where they were measured on the same sample.
    """

    def __init__(self, folder: Path, resume: bool = True, drift: Drift | None = None) -> None:
        self._folder = folder
        self._resume = resume
        self._drift = drift
        self._offered: dict[int, tuple[PassDrift, ...]] = {}
        self._start = ""
        self._known_remarks = 0

    def resume(self, event: PipelineEvent) -> ResumePoint | None:
        """Offer the furthest checkpoint that fits."""
        if event.context.site_filter is not None:
            return None
        self._start = content_hash(event.program)
        self._offered.clear()
        lengths = range(len(event.passes), 0, -1) if self._resume else ()
        offers = (self._load(event, length) for length in lengths)
        return next((offer for offer in offers if offer is not None), None)

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Make the folder, and restore the drifts of the passes that need not run.

        Raises:
            ArtifactError: when it cannot be made.
        """
        self._known_remarks = len(event.context.remarks)
        if self._drift is not None:
            self._drift.restore(self._offered.get(event.done, ()))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(str(self._folder), f"cannot be made: {error.strerror}") from error

    def after_pass(self, event: PassEnd) -> None:
        """Write a checkpoint, whole or not at all.

        Raises:
            ArtifactError: when it cannot be written.
        """
        if event.context.site_filter is not None:
            return
        remarks = remarks_to_json(event.context.remarks[self._known_remarks :])
        path = self._path(event.passes[: event.index + 1], event.context.seed)
        # As text, because a figure may be NaN, which the file's header cannot hold.
        save_program(event.result, path, {_REMARKS: json.dumps(remarks), **self._drift_extra()})

    def _drift_extra(self) -> dict[str, Json]:
        if self._drift is None:
            return {}
        drifts = json.dumps(drifts_to_json(self._drift.drifts))
        return {_DRIFTS: drifts, _SAMPLE: self._drift.sample_hash()}

    def _drifts_of(self, extra: Mapping[str, Json]) -> tuple[PassDrift, ...]:
        """The drifts in a checkpoint; none where they are of another sample."""
        if self._drift is None or extra.get(_SAMPLE) != self._drift.sample_hash():
            return ()
        return drifts_from_json(json.loads(str(extra[_DRIFTS])))

    def _load(self, event: PipelineEvent, length: int) -> ResumePoint | None:
        path = self._path(event.passes[:length], event.context.seed)
        if not path.exists():
            return None
        try:
            program = load_program(path)
            extra = read_header(path).extra
            remarks = remarks_from_json(json.loads(str(extra[_REMARKS])))
            self._offered[length] = self._drifts_of(extra)
        except (ArtifactError, KeyError, ValueError) as error:
            message = f"checkpoint is not used and its pass runs again: {error}"
            warnings.warn(message, CheckpointWarning, stacklevel=2)
            return None
        return ResumePoint(length, program, tuple(remarks))

    def _path(self, prefix: Sequence[Pass], seed: int) -> Path:
        identity = [self._start, [format_pass(current) for current in prefix], seed]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return self._folder / f"{len(prefix):02d}-{prefix[-1].name}-{key[:32]}.shohin"
