"""Drawings of a ternary training, by matplotlib where that is installed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shohin.errors import SpecError
from shohin.ir.files import atomic_path
from shohin.passes.analyses.figures import check_figure
from shohin.passes.ternarising.history import Point

CURVES = "ternary-curves.png"
_MANY = 12
_DARK_ENOUGH = 0.9  # of the colours, whose last ones are hard to see on white


def check_folder(folder: Path | None) -> None:
    """Refuse to draw where that cannot be, before anything is computed.

    Raises:
        SpecError: when there is no folder, or matplotlib is not installed.
    """
    if folder is None:
        hint = "give workdir=..., or --workdir on the command line"
        raise SpecError("ternary figures", "needs a work directory, got none", hint)
    check_figure(folder / CURVES)


def draw_curves(path: Path, points: Sequence[Point]) -> None:
    """Draw loss, both scales and zeros of each layer over the epochs, as the article does.

    Args:
        path: a file that matplotlib can write.
        points: the first is from before the training.
    """
    from matplotlib.figure import Figure

    # Not through pyplot, which keeps figures and settings of the whole process.
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    trained = [point for point in points if point.loss is not None]
    epochs = [point.epoch for point in trained]
    axes[0][0].plot(epochs, [point.loss for point in trained], color="black")
    axes[0][0].set_ylabel("mean training loss")
    _lines(axes[0][1], points, lambda point, name: 100 * point.zeros[name])
    axes[0][1].set_ylabel("elements that are zero (%)")
    _lines(axes[1][0], points, lambda point, name: point.positive[name])
    axes[1][0].set_ylabel("positive scale $W_p$")
    _lines(axes[1][1], points, lambda point, name: point.negative[name])
    axes[1][1].set_ylabel("negative scale $W_n$")
    for one in axes.flat:
        one.set_xlabel("epoch")
        one.xaxis.get_major_locator().set_params(integer=True)
        one.grid(alpha=0.3)
    handles, labels = axes[0][1].get_legend_handles_labels()
    if handles:
        columns = 1 if len(handles) <= 2 * _MANY else 2
        figure.legend(handles, labels, loc="outside right center", fontsize=7, ncols=columns)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)


def _lines(axes: Any, points: Sequence[Point], value: Callable[[Point, str], float]) -> None:
    from matplotlib import colormaps

    names, epochs = [*points[0].zeros] if points else [], [point.epoch for point in points]
    shades = colormaps["viridis"]
    for index, name in enumerate(names):
        colour = shades(_DARK_ENOUGH * index / max(1, len(names) - 1))
        found = [value(point, name) for point in points]
        axes.plot(epochs, found, color=colour, label=name, linewidth=1.2)
