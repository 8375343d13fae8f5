"""How much of what a layer computes a chain of each rank keeps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.passes.factoring.factors import LayerShape, Ranks, Scheme, vertical_matrix
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.responses import Observed

_LEAST_EIGENVALUE = 1e-7
"""Of second moments, over the largest: what is below is rounding."""


@dataclass(frozen=True, eq=False)
class Energies:
    """Shares of the energy by rank: entry `r` is what the first ``r + 1`` components have.

    Attributes:
        channel: of the responses, along their principal axes.
        spatial: of the ``h x 1`` filters; empty where a layer is not split so.
    """

    channel: Tensor
    spatial: Tensor

    def kept(self, ranks: Ranks) -> float:
        """The share that a chain keeps, those of its steps multiplied."""
        kept = 1.0
        if ranks.channel is not None:
            kept *= float(self.channel[ranks.channel - 1])
        if ranks.spatial is not None:
            kept *= float(self.spatial[ranks.spatial - 1])
        return kept

    def loss(self, ranks: Ranks) -> float:
        """Negative logarithm of the share kept."""
        return -math.log(max(self.kept(ranks), 1e-300))


def energies_of(layer: Layer, observed: Observed | None) -> Energies:
    """The energies of a layer, in its responses, or in its weights where these were not observed.

    A layer whose responses never vary has no energy, and NaN for all shares.
    """
    if observed is None:
        channel = torch.linalg.svdvals(layer.rows).square()
    else:
        channel = observed.principal_energies()
    spatial = torch.zeros(0, dtype=torch.float64)
    if layer.shape.is_spatial:
        spatial = vertical_factors(layer, observed)[1].square()
    return Energies(_shares(channel, layer.shape.outputs), _shares(spatial, len(spatial)))


def vertical_factors(layer: Layer, observed: Observed | None) -> tuple[Tensor, Tensor]:
    """All ``h x 1`` filters of a layer, the strongest first, and their singular values.

    Without observations these are the singular vectors of the weight (Jaderberg et al., arXiv
    1405.3866). With them errors count as the inputs of the taps make them felt: the singular
    vectors are those of the weight times the root of the inputs' second moments.

    Returns:
        float64 `[filters, channels * height]` and `[filters]`.
    """
    matrix = vertical_matrix(layer.weight)
    if observed is None or observed.moments is None:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left.mT, values
    spread, axes = torch.linalg.eigh(observed.moments)
    usable = spread > _LEAST_EIGENVALUE * spread[-1]
    root = spread.clamp_min(0).sqrt()
    inverse = torch.where(usable, 1 / torch.where(usable, root, 1.0), 0.0)
    left, values, _ = torch.linalg.svd((axes * root).mT @ matrix, full_matrices=False)
    return (axes @ (inverse.unsqueeze(1) * left)).mT, values


def rank_choices(shape: LayerShape, scheme: Scheme, multiple: int) -> Iterator[Ranks]:
    """The ways to split a layer, the layer as it was first.

    Ranks are multiples of a number. Where a layer is too thin for that its half and quarter are
    tried as well.

    Args:
        shape: of the layer.
        scheme: how to split; layers without height and width only have channels.
        multiple: what ranks are multiples of.
    """
    yield Ranks()
    channels = _ranks(min(shape.outputs, _inputs(shape)), multiple)
    if scheme == "channel" or not shape.is_spatial:
        yield from (Ranks(channel=rank) for rank in channels if scheme != "spatial")
        return
    height, width = shape.kernel
    verticals = _ranks(min(shape.inputs * height, shape.outputs * width), multiple)
    if scheme == "spatial":
        yield from (Ranks(spatial=rank) for rank in verticals)
        return
    yield from (
        Ranks(rank, vertical)
        for vertical in verticals
        for rank in channels
        if rank <= vertical * width
    )


def _ranks(full: int, multiple: int) -> Sequence[int]:
    thin = [part for part in (multiple // 4, multiple // 2) if 0 < part < full]
    return [*(thin if full <= 4 * multiple else []), *range(multiple, full, multiple)]


def _inputs(shape: LayerShape) -> int:
    return shape.inputs * shape.kernel[0] * shape.kernel[1]


def _shares(energies: Tensor, count: int) -> Tensor:
    """Shares of the first so many components, those that there are not included."""
    padded = torch.zeros(count, dtype=torch.float64)
    padded[: len(energies)] = energies[:count]
    return padded.cumsum(0) / padded.sum()
