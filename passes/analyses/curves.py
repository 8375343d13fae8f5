"""Sensitivity curves: what they hold, and the CSV files that keep them."""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from shohin.errors import ArtifactError
from shohin.ir.files import atomic_path
from shohin.passes.analyses.figures import draw_lines

_COLUMNS = ("weight", "node", "density", "accuracy")
_HINT = "give a file that Sensitivity.save_csv wrote, or remove it"


@dataclass(frozen=True)
class LayerCurve:
    """What a model measures while one of its weights is pruned and all others are whole.

    Attributes:
        weight: name of the weight.
        node: name of the first node that reads it.
        points: density, above 0 and at most 1, and the measure there; densities ascend.
    """

    weight: str
    node: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Sensitivity:
    """How much each layer of a model can be pruned before its accuracy falls.

    Attributes:
        layers: one curve a weight, in the order in which the weights are first used.
        baseline: the measure of the model as it is.
    """

    layers: tuple[LayerCurve, ...]
    baseline: float

    def save_csv(self, path: str | Path) -> Path:
        """Write the curves, one point a line; the first line is the baseline, of no weight.

        Numbers are written so that `read_csv` gives the same ones back.

        Raises:
            ArtifactError: when the file cannot be written.
        """
        lines = [("", "", 1.0, self.baseline)]
        lines += [
            (curve.weight, curve.node, *point) for curve in self.layers for point in curve.points
        ]
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((*names, repr(one), repr(two)) for *names, one, two in lines)
        return Path(path)

    @classmethod
    def read_csv(cls, path: str | Path) -> "Sensitivity":
        """Read what `save_csv` wrote.

        Raises:
            ArtifactError: when the file is missing, or a line of it is malformed.
        """
        rows = list(_read_rows(Path(path)))
        if not rows or rows[0][:3] != ("", "", 1.0):
            raise ArtifactError(f"{path}, line 2", "expected the baseline, of no weight", _HINT)
        _check_order(rows, path)
        return cls(tuple(_curves(rows[1:])), rows[0][3])

    def draw(self, path: str | Path) -> Path:
        """Draw the figure of Han et al.: change of the measure over the share that is kept.

        Args:
            path: a file whose name ends in ``.png``, ``.pdf`` or ``.svg``.

        Raises:
            SpecError: when the name ends in anything else, or matplotlib is not installed.
            ArtifactError: when the file cannot be written.
        """
        lines = {
            curve.weight: [(density, found - self.baseline) for density, found in curve.points]
            for curve in self.layers
        }
        return draw_lines(lines, Path(path))


_Row = tuple[str, str, float, float]


def _read_rows(path: Path) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(_read_text(path)), strict=True)
    try:
        if tuple(next(reader, ())) != _COLUMNS:
            problem = f"expected the columns {','.join(_COLUMNS)}"
            raise ArtifactError(f"{path}, line 1", problem, _HINT)
        for line in reader:
            yield _row(line, f"{path}, line {reader.line_num}")
    except csv.Error as error:
        where = f"{path}, line {reader.line_num}"
        raise ArtifactError(where, f"malformed: {error}", _HINT) from error


def _read_text(path: Path) -> str:
    """The text of a file whose last line is whole: half a number is a number, too."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(str(path), "there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(str(path), f"cannot be read: {error}", _HINT) from error
    if text and not text.endswith("\n"):
        raise ArtifactError(str(path), "truncated: its last line has no end", _HINT)
    return text


def _row(line: list[str], where: str) -> _Row:
    if len(line) != len(_COLUMNS):
        raise ArtifactError(where, f"expected {len(_COLUMNS)} columns, got {len(line)}", _HINT)
    try:
        density, accuracy = float(line[2]), float(line[3])
    except ValueError as error:
        raise ArtifactError(where, f"expected two numbers, got {','.join(line[2:])}") from error
    if not 0 < density <= 1:
        raise ArtifactError(where, f"expected 0 < density <= 1, got {density}", _HINT)
    return line[0], line[1], density, accuracy


def _check_order(rows: list[_Row], path: str | Path) -> None:
    """Refuse a weight whose lines do not lie together, or whose densities do not ascend."""
    for number, (one, two) in enumerate(pairwise(rows), 3):
        if one[0] == two[0] and not one[2] < two[2]:
            problem = f"expected a density above {one[2]}, got {two[2]}"
            raise ArtifactError(f"{path}, line {number}", problem, _HINT)
    names = [name for name, _ in groupby(row[0] for row in rows)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ArtifactError(str(path), f"the lines of '{repeated}' do not lie together", _HINT)


def _curves(rows: Iterable[_Row]) -> Iterator[LayerCurve]:
    for weight, found in groupby(rows, key=lambda row: row[0]):
        lines = list(found)
        points = tuple((density, accuracy) for _, _, density, accuracy in lines)
        yield LayerCurve(weight, lines[0][1], points)
