"""The report of an optimisation: what it cost before and after, and every decision with its why."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from shohin.errors import SpecError
from shohin.ir.encodings import Json
from shohin.ir.files import atomic_path
from shohin.layers import Layer, Totals
from shohin.passes.base import Pass
from shohin.passes.instruments.drift import PassDrift
from shohin.passes.pipeline import format_pass
from shohin.passes.remarks import Outcome, Remark
from shohin.tables import Grid, change, ratio, render, shape_text

_WIDTH = 120
_SHOWN_NAMES = 6
_LAYERS = "Layers"
_PASSES = "Passes"
_DRIFT_HEADS = (">max error", ">relative error", ">max in total", ">relative in total")


@dataclass(frozen=True)
class LayerChange:
    """One layer before and after.

    Attributes:
        name: dotted path of the layer's module.
        before: the layer in the program that went in; None when a pass made it.
        after: the layer in the program that came out; None when a pass removed it.
    """

    name: str
    before: Layer | None
    after: Layer | None


@dataclass(frozen=True)
class PassRow:
    """What one pass did.

    Attributes:
        text: canonical text of the pass.
        seconds: wall time, or None when its result was taken from a checkpoint.
        changed: number of sites that it changed.
        skipped: number of sites that it left as they are.
        drift: how far it moved the output on a sample batch, where that was measured.
    """

    text: str
    seconds: float | None
    changed: int
    skipped: int
    drift: PassDrift | None


@dataclass(frozen=True)
class Evaluation:
    """The user's measure of the model, higher is better.

    Attributes:
        before: of the program that went in.
        after: of the program that came out.
    """

    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """What an optimisation did.

    Attributes:
        name: the model's name.
        pipeline: canonical text of the passes.
        before: costs of the program that went in.
        after: costs of the program that came out.
        layers: every layer before and after, in the order in which they run.
        passes: what each pass did, in order.
        remarks: every decision, in order.
        evaluation: the user's measure before and after, where there is one.
        on_noise: whether the drifts were measured on noise, for want of calibration batches.
    """

    name: str
    pipeline: str
    before: Totals
    after: Totals
    layers: tuple[LayerChange, ...]
    passes: tuple[PassRow, ...]
    remarks: tuple[Remark, ...]
    evaluation: Evaluation | None = None
    on_noise: bool = False

    def skipped(self) -> tuple[Remark, ...]:
        """The remarks on what was left as it is."""
        return tuple(remark for remark in self.remarks if remark.outcome is Outcome.SKIPPED)

    def notes(self) -> tuple[Remark, ...]:
        """The remarks on the program as a whole."""
        return tuple(remark for remark in self.remarks if remark.outcome is Outcome.NOTED)

    def grids(self) -> Iterator[Grid]:
        """The report as tables: totals, layers, passes, notes, what was skipped and why."""
        yield self._total_grid()
        yield self._layer_grid()
        yield self._pass_grid()
        if self.notes():
            yield self._notes_grid()
        if self.skipped():
            yield self._skipped_grid()

    def removed(self) -> tuple[str, ...]:
        """Names of the layers of which nothing is left."""
        return tuple(layer.name for layer in self.layers if layer.after is None)

    def renderables(self) -> Iterator[RenderableType]:
        """The report for a rich console."""
        yield Text(f"{self.name}: {self.pipeline}", style="bold")
        for grid in self.grids():
            yield ""
            yield grid
            if grid.title == _LAYERS and self.removed():
                yield Text(f"removed: {_enumerate(self.removed())}")
            if grid.title == _PASSES and self._has_drifts():
                yield Text(self._drift_note())

    def text(self, width: int = _WIDTH) -> str:
        """The report as plain text.

        Args:
            width: columns to fill at most.
        """
        return render(self.renderables(), width)

    def markdown(self) -> str:
        """The report in Markdown."""
        parts = [
            f"# {self.name}",
            f"`{self.pipeline}`",
            *(grid.markdown() for grid in self.grids()),
        ]
        if self.removed():
            parts.append(f"Removed: {', '.join(self.removed())}.")
        if self._has_drifts():
            note = self._drift_note()
            parts.append(f"{note[0].upper()}{note[1:]}.")
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Json]:
        """The report as plain values; a figure that is NaN or infinite becomes a text."""
        described: dict[str, Json] = {
            "name": self.name,
            "pipeline": self.pipeline,
            "before": plain(asdict(self.before)),
            "after": plain(asdict(self.after)),
            "evaluation": plain(asdict(self.evaluation)) if self.evaluation else None,
            "drift_on_noise": self.on_noise,
            "layers": [plain(asdict(layer)) for layer in self.layers],
            "passes": [plain(asdict(row)) for row in self.passes],
            "remarks": [plain(asdict(remark)) for remark in self.remarks],
        }
        return described

    def save(self, path: str | Path) -> Path:
        """Write the report; the ending of the name chooses the form.

        Args:
            path: a file whose name ends in ``.json``, ``.md`` or ``.txt``.

        Raises:
            SpecError: when the name ends in anything else.
            ArtifactError: when the file cannot be written.
        """
        file = Path(path)
        forms: dict[str, Callable[[], str]] = {
            ".json": lambda: json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n",
            ".md": self.markdown,
            ".txt": lambda: self.text() + "\n",
        }
        if file.suffix not in forms:
            problem = f"expected a name that ends in .json, .md or .txt, got '{file.suffix}'"
            raise SpecError(str(file), problem)
        text = forms[file.suffix]()
        with atomic_path(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return file

    def _total_grid(self) -> Grid:
        rows = [
            _figure_row("parameters", self.before.nonzeros, self.after.nonzeros),
            _figure_row("MACs", self.before.nonzero_macs, self.after.nonzero_macs),
            _figure_row("stored bytes", self.before.stored_bytes, self.after.stored_bytes),
            _figure_row(
                "peak activation bytes",
                self.before.peak_memory_bytes,
                self.after.peak_memory_bytes,
            ),
        ]
        if self.evaluation:
            before, after = self.evaluation.before, self.evaluation.after
            rows.append(("evaluation", f"{before:.4g}", f"{after:.4g}", f"{after - before:+.4g}"))
        return Grid("", ("total", ">before", ">after", ">change"), tuple(rows))

    def _layer_grid(self) -> Grid:
        heads = ("layer", "shape", "encoding", ">parameters", ">MACs", ">bytes", ">smaller")
        rows = (_layer_row(layer.before, layer.after) for layer in self.layers if layer.after)
        optional = ("shape", ">MACs", ">parameters")
        return Grid(_LAYERS, heads, tuple(rows), optional=optional)

    def _pass_grid(self) -> Grid:
        drifts = self._has_drifts()
        heads = ("pass", ">seconds", ">changed", ">skipped")
        rows = [_pass_row(row, drifts) for row in self.passes]
        optional = (">max in total", ">skipped")
        return Grid(
            _PASSES, (*heads, *(_DRIFT_HEADS if drifts else ())), tuple(rows), optional=optional
        )

    def _has_drifts(self) -> bool:
        return any(row.drift for row in self.passes)

    def _drift_note(self) -> str:
        """What the errors in the table of passes mean."""
        sample = "noise, as no data was given" if self.on_noise else "the first calibration batch"
        return (
            "errors: outputs against those before the pass, in total against the original's, "
            f"on {sample}"
        )

    def _notes_grid(self) -> Grid:
        rows = [(note.pass_name, note.reason, note.detail) for note in self.notes()]
        return Grid("Notes", ("pass", "about", "what"), tuple(rows))

    def _skipped_grid(self) -> Grid:
        heads = ("pass", "reason", "where", "why")
        return Grid("Left as they are", heads, _skipped_rows(self))


def pair_layers(before: Sequence[Layer], after: Sequence[Layer]) -> tuple[LayerChange, ...]:
    """The layers of two programs side by side, by name; what passes made stands at the end."""
    first = {layer.name: layer for layer in before}
    second = {layer.name: layer for layer in after}
    names = dict.fromkeys([*first, *second])
    return tuple(LayerChange(name, first.get(name), second.get(name)) for name in names)


def pass_rows(
    passes: Sequence[Pass],
    seconds: Sequence[float],
    drifts: Sequence[PassDrift],
    remarks: Sequence[Remark],
) -> tuple[PassRow, ...]:
    """What each pass did.

    Args:
        passes: the passes, in order.
        seconds: wall times of the passes that ran; those before them were resumed.
        drifts: drifts of the last passes, or of all, or none.
        remarks: the remarks of all passes. Those of passes of one name stand at the first.
    """
    resumed, unknown = len(passes) - len(seconds), len(passes) - len(drifts)
    counts = Counter((remark.pass_name, remark.outcome) for remark in remarks)
    return tuple(
        PassRow(
            format_pass(item),
            seconds[index - resumed] if index >= resumed else None,
            counts.pop((item.name, Outcome.CHANGED), 0),
            counts.pop((item.name, Outcome.SKIPPED), 0),
            drifts[index - unknown] if index >= unknown else None,
        )
        for index, item in enumerate(passes)
    )


def _figure_row(name: str, before: int, after: int) -> tuple[str, ...]:
    return (name, f"{before:,}", f"{after:,}", f"{ratio(before, after)}")


def _layer_row(before: Layer | None, after: Layer) -> tuple[str, ...]:
    first = before or Layer("", "")
    figures = (
        (first.nonzeros, after.nonzeros),
        (first.nonzero_macs, after.nonzero_macs),
        (first.stored_bytes, after.stored_bytes),
    )
    return (
        after.name,
        change(shape_text(first.shapes), shape_text(after.shapes)),
        change(first.encoding, after.encoding),
        *(change(f"{one:,}" if before else "", f"{two:,}") for one, two in figures),
        ratio(first.stored_bytes, after.stored_bytes) if before else "new",
    )


def _pass_row(row: PassRow, drifts: bool) -> tuple[str, ...]:
    seconds = "resumed" if row.seconds is None else f"{row.seconds:.2f}"
    cells = (row.text, seconds, str(row.changed), str(row.skipped))
    if not drifts:
        return cells
    if row.drift is None:
        return (*cells, "", "", "", "")
    errors = (row.drift.step, row.drift.total)
    figures = [figure for error in errors for figure in (error.absolute, error.relative)]
    return (*cells, *(f"{figure:.2g}" for figure in figures))


def _skipped_rows(report: Report) -> tuple[tuple[str, ...], ...]:
    """One row for each pass and reason; the details are said when they are all of one kind."""
    groups: dict[tuple[str, str], list[Remark]] = {}
    for remark in report.skipped():
        groups.setdefault((remark.pass_name, remark.reason), []).append(remark)
    return tuple(
        (pass_name, reason, _places(remarks), _details(remarks))
        for (pass_name, reason), remarks in groups.items()
    )


def _places(remarks: Sequence[Remark]) -> str:
    return _enumerate(dict.fromkeys(remark.module or remark.node for remark in remarks))


def _enumerate(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - _SHOWN_NAMES} more" if len(known) > _SHOWN_NAMES else ""
    return ", ".join(known[:_SHOWN_NAMES]) + more


def _details(remarks: Sequence[Remark]) -> str:
    details = list(dict.fromkeys(remark.detail for remark in remarks if remark.detail))
    more = f"; {len(details) - 2} more" if len(details) > 2 else ""
    return "; ".join(details[:2]) + more


def plain(value: Any) -> Json:
    """A value as JSON can hold it: tuples as lists, figures that are not finite as texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value  # type: ignore[no-any-return]
