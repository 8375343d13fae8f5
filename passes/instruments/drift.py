"""How far each pass moves the program's output on a sample batch."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table
from torch import Tensor, nn

from shohin.errors import ArtifactError
from shohin.ir.encodings import Json
from shohin.passes.base import Batch
from shohin.passes.instruments.base import Instrument, PassEnd, PipelineEvent, ResumePoint
from shohin.passes.pipeline import format_pass


@dataclass(frozen=True)
class Error:
    """Difference of two outputs.

    Attributes:
        absolute: largest absolute difference of two elements; NaN where only one of them is NaN,
            and infinite when shapes differ.
        relative: the absolute one over the largest absolute element of the reference.
    """

    absolute: float
    relative: float


@dataclass(frozen=True)
class PassDrift:
    """What a pass did to the output.

    Attributes:
        text: the pass' canonical text.
        step: error against the output before the pass.
        total: error against the output of the program that the pipeline was given.
    """

    text: str
    step: Error
    total: Error


class Drift(Instrument):
    """Runs the program on a sample batch after every pass and compares the outputs.

    Args:
        batch: the inputs, a tuple of tensors.
        is_noise: whether they were made up. A program that cannot run on made-up inputs is left
            alone.
    """

    def __init__(self, batch: Batch, is_noise: bool = False) -> None:
        self.is_noise = is_noise
        self._batch = batch
        self._can_run = True
        self._original: tuple[Tensor, ...] = ()
        self._latest: tuple[Tensor, ...] = ()
        self._drifts: list[PassDrift] = []

    @property
    def drifts(self) -> tuple[PassDrift, ...]:
        """What each pass of the last pipeline did, in order; of resumed ones where restored."""
        return tuple(self._drifts)

    def sample_hash(self) -> str:
        """A hash of the sample batch."""
        digest = hashlib.sha256()
        for tensor in self._batch:
            dense = tensor.detach().cpu().contiguous()
            digest.update(f"{dense.dtype}{tuple(dense.shape)}".encode())
            digest.update(dense.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def restore(self, drifts: Sequence[PassDrift]) -> None:
        """Take over what was measured for the first passes, which need not run again."""
        self._drifts[:0] = drifts

    def resume(self, event: PipelineEvent) -> ResumePoint | None:
        """Forget what the last pipeline did; nothing is offered."""
        self._drifts.clear()
        self._can_run = True
        return None

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Compute the original output."""
        try:
            self._original = outputs(event.program.module, self._batch)
        except Exception:  # a model may raise anything on numbers that mean nothing
            self._can_run = False
            if not self.is_noise:
                raise
        self._latest = self._original if event.done == 0 else ()

    def after_pass(self, event: PassEnd) -> None:
        """Compare the output with those before."""
        if not self._can_run:
            return
        before = self._latest or outputs(event.program.module, self._batch)
        self._latest = outputs(event.result.module, self._batch)
        step, total = compare(before, self._latest), compare(self._original, self._latest)
        self._drifts.append(PassDrift(format_pass(event.current), step, total))

    def table(self) -> Table:
        """The errors as a table."""
        table = Table("pass", "step abs", "step rel", "total abs", "total rel", title="Drift")
        for drift in self._drifts:
            errors = (drift.step, drift.total)
            figures = [f"{figure:.3g}" for e in errors for figure in (e.absolute, e.relative)]
            table.add_row(drift.text, *figures)
        return table


def drifts_to_json(drifts: Sequence[PassDrift]) -> list[Json]:
    """Drifts as plain values for a JSON file, one object each."""
    return [asdict(drift) for drift in drifts]


def drifts_from_json(described: Json) -> tuple[PassDrift, ...]:
    """Rebuild drifts from what `drifts_to_json` gave.

    Raises:
        ArtifactError: when the description is malformed.
    """
    if not isinstance(described, list):
        raise ArtifactError("drifts", f"expected a list, got {type(described).__name__}")
    try:
        return tuple(_drift_from_json(item) for item in described)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("drifts", f"cannot be rebuilt: {error}") from error


def _drift_from_json(described: Json) -> PassDrift:
    values = described if isinstance(described, dict) else {}
    return PassDrift(
        str(values["text"]), _error_from_json(values["step"]), _error_from_json(values["total"])
    )


def _error_from_json(described: Json) -> Error:
    values = described if isinstance(described, dict) else {}
    return Error(float(str(values["absolute"])), float(str(values["relative"])))


def outputs(module: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """A module's outputs on a batch, without gradients, always as a tuple."""
    with torch.no_grad():
        result = module(*batch)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def compare(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Error:
    """The largest errors over all outputs, computed in double precision."""
    shapes = [tuple(tensor.shape) for tensor in reference]
    if shapes != [tuple(tensor.shape) for tensor in other]:
        return Error(float("inf"), float("inf"))
    pairs = list(zip(reference, other, strict=True))
    errors = [_tensor_error(first, second) for first, second in pairs]
    absolute = torch.tensor([error.absolute for error in errors] or [0.0], dtype=torch.double).max()
    relative = torch.tensor([error.relative for error in errors] or [0.0], dtype=torch.double).max()
    return Error(float(absolute), float(relative))


def _tensor_error(reference: Tensor, other: Tensor) -> Error:
    first, second = reference.double(), other.double()
    same = (first == second) | (first.isnan() & second.isnan())
    difference = torch.where(same, 0.0, (first - second).abs())
    absolute = float(difference.max()) if difference.numel() else 0.0
    scale = float(first.nan_to_num(0.0).abs().max()) if first.numel() else 0.0
    if absolute == 0.0:
        return Error(0.0, 0.0)
    return Error(absolute, absolute / scale if scale else float("inf"))
