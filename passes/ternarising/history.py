"""What losses, scales and zeros of ternary layers were after each epoch of their training."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import ShohinWarning
from shohin.ir.files import atomic_path, make_folder
from shohin.ir.ternarising import Ternarised, frozen
from shohin.passes.trainer import Loss

HISTORY = "ternary-history.json"


@dataclass(frozen=True)
class Point:
    """The state after an epoch.

    Attributes:
        epoch: how many were done.
        loss: mean of the training loss of the last one; None before the first.
        positive: what 1 stands for, by weight name.
        negative: what -1 stands for without its sign, by weight name.
        zeros: share of the elements that are zero, 0 to 1, by weight name.
    """

    epoch: int
    loss: float | None
    positive: Mapping[str, float]
    negative: Mapping[str, float]
    zeros: Mapping[str, float]


@dataclass
class History:
    """Points before the first epoch and after each one, kept in a file where there is a folder.

    Attributes:
        folder: for the file, or None.
        points: the first is from before the training.
    """

    folder: Path | None = None
    points: list[Point] = field(default_factory=list)
    _losses: list[Tensor] = field(default_factory=list)

    def observed(self, loss: Loss) -> Loss:
        """A loss whose values while training make the next point's mean."""

        def compute(output: Any, label: Any) -> Tensor:
            value = loss(output, label)
            if torch.is_grad_enabled():
                self._losses.append(value.detach())
            return value

        return compute

    def begin(self, module: nn.Module, holders: Mapping[str, Ternarised], *, resume: bool) -> None:
        """Take the point before the first epoch, inside of `ternarised`.

        Args:
            module: what is trained.
            holders: what makes each weight, by its name.
            resume: whether to keep later points that an interrupted training from the same
                weights has left.
        """
        if resume:
            self.load()
        start = _point(module, holders, 0, None)
        if not self.points or self.points[0] != start:
            self.points = [start]
        self._save()

    def record(self, module: nn.Module, holders: Mapping[str, Ternarised], epoch: int) -> None:
        """Add what weights are after an epoch, inside of `ternarised`.

        Args:
            module: what is trained.
            holders: what makes each weight, by its name.
            epoch: how many were done; points of later ones, from before an interruption, go.
        """
        loss = float(torch.stack(self._losses).double().mean()) if self._losses else None
        self._losses.clear()
        kept = [point for point in self.points if point.epoch < epoch]
        self.points = [*kept, _point(module, holders, epoch, loss)]
        self._save()

    def load(self) -> None:
        """Take the points that a training has left in the folder, if there are any."""
        path = self._path
        if path is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, list):
                raise TypeError(f"expected a list of points, got {type(found).__name__}")
            self.points = [Point(**one) for one in found]
        except (OSError, ValueError, TypeError) as error:
            text = f"{path.name} is not used, its curves begin anew: {error}"
            warnings.warn(text, ShohinWarning, stacklevel=2)

    @property
    def _path(self) -> Path | None:
        return None if self.folder is None else self.folder / HISTORY

    def _save(self) -> None:
        if self._path is None:
            return
        make_folder(self._path.parent)
        with atomic_path(self._path) as temporary:
            temporary.write_text(json.dumps([vars(point) for point in self.points]) + "\n")


def _point(
    module: nn.Module, holders: Mapping[str, Ternarised], epoch: int, loss: float | None
) -> Point:
    weights = frozen(module, holders)
    pairs = {name: one.pairs()[0].tolist() for name, one in weights.items()}
    return Point(
        epoch,
        loss,
        {name: pair[0] for name, pair in pairs.items()},
        {name: pair[1] for name, pair in pairs.items()},
        {name: 1 - one.density for name, one in weights.items()},
    )
