"""How much of what a layer computes a chain of each rank keeps."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.passes.factoring.factors import (
    LayerShape,
    Ranks,
    Scheme,
    inner_matrix,
    vertical_matrix,
)
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.responses import Observed

_MOST_OF_A_STEP = 64
"""Ranks of a step that are compared where two are chosen together."""

_LEAST_EIGENVALUE = 1e-7
"""Of second moments, over the largest: what is below is rounding."""


@dataclass(frozen=True, eq=False)
class Energies:
    """Shares of the energy by rank: entry `r` is what the first ``r + 1`` components have.

    Attributes:
        channel: of the responses, along their principal axes.
        spatial: of the ``h x 1`` filters; empty where a layer is not split so.
        inner: of the filters of a first ``1 x 1``; likewise.
    """

    channel: Tensor
    spatial: Tensor
    inner: Tensor

    def kept(self, ranks: Ranks) -> float:
        """The share that a chain keeps, those of its steps multiplied."""
        kept = 1.0
        if ranks.channel is not None:
            kept *= float(self.channel[ranks.channel - 1])
        if ranks.spatial is not None:
            kept *= float(self.spatial[ranks.spatial - 1])
        if ranks.inner is not None:
            kept *= float(self.inner[ranks.inner - 1])
        return kept

    def loss(self, ranks: Ranks) -> float:
        """Negative logarithm of the share kept."""
        return -math.log(max(self.kept(ranks), 1e-300))


def energies_of(layer: Layer, scheme: Scheme, observed: Observed | None) -> Energies:
    """The energies of a layer, in its responses, or in its weights where these were not observed.

    A layer whose responses never vary has no energy, and NaN for all shares.
    """
    if observed is None:
        channel = torch.linalg.svdvals(layer.rows).square()
    else:
        channel = observed.principal_energies()
    spatial = inner = torch.zeros(0, dtype=torch.float64)
    if layer.shape.is_spatial and scheme in ("spatial", "3d"):
        spatial = _factors(vertical_matrix(layer.weight), column_moments(observed))[1].square()
    if layer.shape.is_spatial and scheme == "bottleneck":
        inner = _factors(inner_matrix(layer.weight), pixel_moments(layer, observed))[1].square()
    shares = (_shares(one, len(one)) for one in (spatial, inner))
    return Energies(_shares(channel, layer.shape.outputs), *shares)


def column_moments(observed: Observed | None) -> Tensor | None:
    """Second moments of the inputs in one column of taps, where they were observed."""
    return None if observed is None else observed.moments


def pixel_moments(layer: Layer, observed: Observed | None) -> Tensor | None:
    """Second moments of the channels of one input pixel, where they were observed."""
    moments = column_moments(observed)
    if moments is None:
        return None
    size = (layer.shape.inputs, layer.shape.kernel[0])
    return torch.einsum("aibi->ab", moments.reshape(*size, *size))


def first_filters(matrix: Tensor, moments: Tensor | None, count: int) -> Tensor:
    """The strongest filters of the first step of a chain.

    Without moments these are singular vectors of the weight (Jaderberg et al., arXiv 1405.3866).
    With them errors count as the inputs make them felt: the singular vectors are those of the
    weight times the root of the inputs' second moments.

    Args:
        matrix: the weight, float64 `[inputs of the step, everything else]`.
        moments: float64 `[inputs, inputs]`, or None.
        count: how many.

    Returns:
        float64 `[count, inputs]`.
    """
    return _factors(matrix, moments)[0][:count]


def _factors(matrix: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """All filters, the strongest first, and their singular values."""
    if moments is None:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return left.mT, values
    spread, axes = torch.linalg.eigh(moments)
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
    if scheme in ("3d", "bottleneck") and shape.is_spatial:
        yield from _pairs(shape, scheme, multiple)
        return
    if scheme == "channel" or not shape.is_spatial:
        yield from (Ranks(channel=rank) for rank in channels if scheme != "spatial")
        return
    height, width = shape.kernel
    verticals = _ranks(min(shape.inputs * height, shape.outputs * width), multiple)
    yield from (Ranks(spatial=rank) for rank in verticals)


def _pairs(shape: LayerShape, scheme: Scheme, multiple: int) -> Iterator[Ranks]:
    """Ranks of two steps, of which the second is no wider than what comes in."""
    height, width = shape.kernel
    taps = width if scheme == "3d" else height * width
    outer = min(shape.outputs, _inputs(shape))
    full = min(shape.inputs, shape.outputs * height * width)
    if scheme == "3d":
        full = min(shape.inputs * height, shape.outputs * width)
    # Fine ranks of both would be far too many pairs.
    steps = [multiple * -(-size // (multiple * _MOST_OF_A_STEP)) for size in (full, outer)]
    for first in _ranks(full, steps[0]):
        for rank in _ranks(outer, steps[1]):
            if rank <= first * taps:
                yield Ranks(rank, first) if scheme == "3d" else Ranks(rank, inner=first)


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
