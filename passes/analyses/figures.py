"""Figures of analyses, drawn with matplotlib where that is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shohin.errors import SpecError
from shohin.ir.files import atomic_path

_FORMS = (".png", ".pdf", ".svg")
_MARKERS = "osD^v<>PX*"
_MANY = 10


def check_figure(path: Path) -> None:
    """Refuse a figure that cannot be drawn, before anything is measured for it.

    Raises:
        SpecError: when the name ends in no known form, or matplotlib is not installed.
    """
    if path.suffix not in _FORMS:
        problem = f"expected a name that ends in {', '.join(_FORMS)}, got '{path.suffix}'"
        raise SpecError(str(path), problem)
    try:
        import matplotlib.figure  # noqa: F401 - only whether it is there
    except ImportError as error:
        hint = "pip install 'shohin[plots]'"
        raise SpecError(
            str(path), "drawing needs matplotlib, which is not installed", hint
        ) from error


def draw_lines(lines: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> Path:
    """Draw the change of a measure over the share of the parameters kept, one line a weight.

    Args:
        lines: by name of the weight, densities and changes.
        path: a file whose name ends in ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        SpecError: when the name ends in anything else, or matplotlib is not installed.
        ArtifactError: when the file cannot be written.
    """
    check_figure(path)
    from matplotlib.figure import Figure

    # Not through pyplot, which keeps figures and settings of the whole process.
    figure = Figure(figsize=(8, max(4.5, 0.24 * len(lines) + 1)), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(lines.items()):
        _draw_line(axes, name, points, index, len(lines))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("parameters of the layer kept (%)")
    axes.set_ylabel("change of the measure")
    axes.set_xlim(0, 102)
    axes.grid(alpha=0.3)
    if lines:
        figure.legend(loc="outside right upper", fontsize=8, title="only layer pruned")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path


def _draw_line(
    axes: Any, name: str, points: Sequence[tuple[float, float]], index: int, count: int
) -> None:
    """One weight: its own colour among few, a colour by depth among many."""
    from matplotlib import colormaps

    few = count <= _MANY
    colour = colormaps["tab10"](index) if few else colormaps["viridis"](index / (count - 1))
    axes.plot(
        [100 * density for density, _ in points],
        [change for _, change in points],
        color=colour,
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=4,
        linewidth=1.3,
        label=name,
    )
