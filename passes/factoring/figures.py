"""Drawings of how layers were split, by matplotlib where that is installed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shohin.errors import SpecError
from shohin.ir.files import atomic_path
from shohin.passes.analyses.figures import check_figure
from shohin.passes.factoring.energies import Energies
from shohin.passes.factoring.factors import Ranks
from shohin.passes.factoring.layers import Layer

_LEAST = 1e-4  # percent that a logarithmic axis begins at

ENERGY, RANKS, ERRORS = "low-rank-energy.png", "low-rank-ranks.png", "low-rank-errors.png"


def check_folder(folder: Path | None) -> None:
    """Refuse to draw where that cannot be, before anything is computed.

    Raises:
        SpecError: when there is no folder, or matplotlib is not installed.
    """
    if folder is None:
        hint = "give workdir=..., or --workdir on the command line"
        raise SpecError("low-rank figures", "needs a work directory, got none", hint)
    check_figure(folder / ENERGY)


def draw_all(
    folder: Path,
    layers: Sequence[Layer],
    energies: Mapping[str, Energies],
    chosen: Mapping[str, Ranks],
    errors: Mapping[str, float],
) -> None:
    """Draw energies by rank, what is lost by rank, and errors over the depth of the network.

    Args:
        folder: made where it is missing.
        layers: in data-flow order.
        energies: of each layer, by name.
        chosen: ranks, by name.
        errors: squared errors of the layers that were fitted, over the squares of the responses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    curves = [
        _Curve(layer.name, energies[layer.name].channel.tolist(), chosen[layer.name].channel)
        for layer in layers
    ]
    _draw_energy(folder / ENERGY, curves)
    _draw_ranks(folder / RANKS, curves)
    named = {layer.name: errors[layer.name] for layer in layers if layer.name in errors}
    draw_errors(folder / ERRORS, {"this network": named})


def draw_errors(path: Path, errors: Mapping[str, Mapping[str, float]]) -> None:
    """Draw relative squared errors over the depth of networks.

    Args:
        path: a file that matplotlib can write.
        errors: by network, and by layer in data-flow order.
    """
    axes, save = _figure(path)
    names = [*dict.fromkeys(name for line in errors.values() for name in line)]
    for label, line in errors.items():
        places = [names.index(name) for name in line]
        axes.plot(places, [100 * error for error in line.values()], marker="o", label=label)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("squared error over squared responses (%)")
    axes.set_ylim(bottom=0)
    if len(errors) > 1:
        axes.legend()
    save()


@dataclass(frozen=True)
class _Curve:
    """A layer in a drawing.

    Attributes:
        name: of the layer.
        kept: share of the energy that each rank keeps.
        rank: the rank that was chosen, or None.
    """

    name: str
    kept: Sequence[float]
    rank: int | None

    def draw(self, axes: Any, across: Sequence[float], up: Sequence[float]) -> None:
        """Draw one point for each rank, the chosen one marked."""
        (line,) = axes.plot(across, up, linewidth=1.2, label=self.name)
        if self.rank is not None:
            point = [across[self.rank - 1]], [up[self.rank - 1]]
            axes.plot(*point, marker="o", color=line.get_color())


def _draw_energy(path: Path, curves: Sequence[_Curve]) -> None:
    """Share of the energy that the first components have, with the rank that was chosen."""
    axes, save = _figure(path)
    for curve in curves:
        count = len(curve.kept)
        shares = [100 * (index + 1) / count for index in range(count)]
        curve.draw(axes, shares, [100 * kept for kept in curve.kept])
    axes.set_xlabel("components kept (% of the filters)")
    axes.set_ylabel("energy of the responses (%)")
    _legend(axes, curves)
    save()


def _draw_ranks(path: Path, curves: Sequence[_Curve]) -> None:
    """What a rank loses of the energy."""
    axes, save = _figure(path)
    for curve in curves:
        lost = [max(_LEAST, 100 * (1 - kept)) for kept in curve.kept]
        curve.draw(axes, [*range(1, len(lost) + 1)], lost)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("energy lost (%)")
    _legend(axes, curves)
    save()


def _legend(axes: Any, curves: Sequence[_Curve]) -> None:
    if curves:
        axes.legend(fontsize=7, ncols=2 if len(curves) > 12 else 1)


def _figure(path: Path) -> tuple[Any, Any]:
    """Axes to draw on, and what saves them."""
    from matplotlib.figure import Figure

    # Not through pyplot, which keeps figures and settings of the whole process.
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)

    def save() -> None:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=130)

    return axes, save
