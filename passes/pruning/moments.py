"""Second moments of a layer's inputs, summed over calibration batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import PassError
from shohin.passes.pruning.unfolding import Unfolding

_PIECE = 1 << 24  # unfolded input elements at a time


@dataclass(frozen=True)
class Sampling:
    """Which output positions of images are looked at.

    Attributes:
        positions: most positions of an image, drawn at random; None for all.
        seed: seed of the draw.
    """

    positions: int | None = None
    seed: int = 0


class Moments:
    """What the reconstruction of a layer needs to know of its inputs and responses.

    With `X` the inputs of one group, one column for each position of each example, a last row of
    ones where the layer has a bias to correct, and `R` what the layer's responses lack to those of
    the original network. Products are of the activations' precision, sums in float64.

    Args:
        weight: the layer's weight, `[outputs, inputs / groups, ...]`.
        groups: number of groups of the layer.
        with_ones: whether `X` has the row of ones.
        sampling: which columns to take.

    Attributes:
        second: ``X X^T``, `[groups, inputs, inputs]`.
        cross: ``R X^T``, `[groups, outputs / groups, inputs]`.
        count: number of columns.
    """

    def __init__(self, weight: Tensor, groups: int, with_ones: bool, sampling: Sampling) -> None:
        outputs, inputs = weight.shape[0], weight[0].numel() + with_ones
        self.second = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(groups, outputs // groups, inputs, dtype=torch.float64)
        self.count = 0
        self._with_ones = with_ones
        self._sums, self._squares = torch.zeros(2, outputs, dtype=torch.float64)
        self._positions = sampling.positions
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def add(self, unfolding: Unfolding, data: Tensor, original: Tensor, response: Tensor) -> None:
        """Add one batch, a bounded piece of it at a time.

        Args:
            unfolding: how inputs become columns.
            data: the layer's inputs.
            original: the layer's responses in the original network.
            response: its responses to `data`, with the weights that are to be changed.
        """
        images = unfolding.images(data)
        wanted, found = (unfolding.responses(one) for one in (original, response))
        inputs = self.second.shape[0] * self.second.shape[1]
        step = max(1, _PIECE // (inputs * wanted.shape[-1]))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            chosen = self._draw(wanted.shape[-1])
            pieces = (unfolding.columns(images[part]), wanted[part], found[part])
            self._add_columns(*(unfolding.by_group(piece, chosen) for piece in pieces))

    def _add_columns(self, x: Tensor, wanted: Tensor, found: Tensor) -> None:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if self._with_ones else x
        self.second += x @ x.mT
        self.cross += (wanted - found) @ x.mT
        responses = wanted.flatten(0, 1).double()
        self._sums += responses.sum(1)
        self._squares += (responses * responses).sum(1)
        self.count += x.shape[-1]

    def _draw(self, positions: int) -> Tensor | None:
        """Which positions to use, or None for all."""
        if self._positions is None or positions <= self._positions:
            return None
        return torch.randperm(positions, generator=self._generator)[: self._positions]

    def energy(self) -> float:
        """Sum of the squared deviations of the original responses from their means."""
        return float((self._squares - self._sums**2 / max(1, self.count)).sum())

    def check(self, layer: str) -> None:
        """Refuse moments of NaN or infinite activations.

        Raises:
            PassError: naming the layer.
        """
        if not bool(torch.isfinite(self.second).all() and torch.isfinite(self.cross).all()):
            raise PassError(
                f"layer '{layer}'",
                "its inputs on the calibration batches are not finite",
                "look for NaN or infinite values in the batches and in the weights before it",
            )
