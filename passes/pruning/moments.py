"""Second moments of a layer's inputs, summed over calibration batches."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import PassError
from shohin.passes.pruning.unfolding import Unfolding

_PIECE = 1 << 24  # unfolded input elements at a time


@dataclass(frozen=True)
class Sampling:
    """Which output positions of images are looked at, and how much they count.

    Attributes:
        positions: most positions of an image, drawn at random; None for all.
        seed: seed of the draw.
        coherence: what the square of a mean over an image's positions counts, over the sum of the
            squares of equal ones.
    """

    positions: int | None = None
    seed: int = 0
    coherence: float = 0.0


class Moments:
    """What the reconstruction of a layer needs to know of its inputs and responses.

    With `X` the inputs of one group, one column for each position of each example, a last row of
    ones where the layer has a bias to correct, and `R` what the layer's responses lack to those
    wanted. With `coherence` the means of both over the positions of each example, `m` and `r`, are
    further columns, times the root of `coherence` and the number of positions. Products are of the
    activations' precision, but of float32 at least; sums are float64.

    Args:
        weight: the layer's weight, `[outputs, inputs / groups, ...]`.
        groups: number of groups of the layer.
        with_ones: whether `X` has the row of ones.
        sampling: which columns to take.
        with_second: whether to sum ``X X^T``.

    Attributes:
        second: ``X X^T``, `[groups, inputs, inputs]`; zero where it is not asked for.
        cross: ``R X^T``, `[groups, outputs / groups, inputs]`.
        count: number of columns.
    """

    def __init__(
        self,
        weight: Tensor,
        groups: int,
        with_ones: bool,
        sampling: Sampling,
        with_second: bool = True,
    ) -> None:
        outputs, inputs = weight.shape[0], weight[0].numel() + with_ones
        self.second = torch.zeros(groups, inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(groups, outputs // groups, inputs, dtype=torch.float64)
        self.count = 0
        self._with_ones, self._with_second = with_ones, with_second
        self._positions, self._coherence = sampling.positions, sampling.coherence
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def add(self, unfolding: Unfolding, data: Tensor, lack: Tensor) -> None:
        """Add one batch, a bounded piece of it at a time.

        Args:
            unfolding: how inputs become columns.
            data: the layer's inputs.
            lack: what its responses to them lack, of their shape.
        """
        # Products of half precision make matrices that are not positive definite.
        images, lacks = (
            one.float() if one.dtype.itemsize < 4 else one
            for one in (unfolding.images(data), unfolding.responses(lack))
        )
        inputs = self.second.shape[0] * self.second.shape[1]
        step = max(1, _PIECE // (inputs * lacks.shape[-1]))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            chosen = self._draw(lacks.shape[-1])
            positions = lacks.shape[-1] if chosen is None else len(chosen)
            pieces = (unfolding.columns(images[part]), lacks[part])
            x, r = (unfolding.by_group(piece, chosen) for piece in pieces)
            self._add_columns(x, r, 1.0)
            if positions > 1 and self._coherence > 0:
                mean_x, mean_r = (one.unfold(2, positions, positions).mean(3) for one in (x, r))
                self._add_columns(mean_x, mean_r, self._coherence * positions)
            self.count += x.shape[-1]

    def _add_columns(self, x: Tensor, r: Tensor, share: float) -> None:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if self._with_ones else x
        if self._with_second:
            self.second += share * (x @ x.mT)
        self.cross += share * (r @ x.mT)

    def _draw(self, positions: int) -> Tensor | None:
        """Which positions to use, or None for all."""
        if self._positions is None or positions <= self._positions:
            return None
        return torch.randperm(positions, generator=self._generator)[: self._positions]

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
