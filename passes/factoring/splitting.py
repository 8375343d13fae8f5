"""One layer made a chain: the filters of its first step, and the map of low rank after them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shohin.passes.factoring.energies import vertical_factors
from shohin.passes.factoring.factors import (
    Chain,
    Ranks,
    balanced,
    horizontal_weight,
    vertical_matrix,
)
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.regression import LowRankMap, Regression
from shohin.passes.factoring.responses import Observed, bias_of, respond
from shohin.passes.factoring.solvers import Schedule, relative_error, solve

Solver: TypeAlias = Literal["weights", "linear", "nonlinear", "asymmetric"]

_CHANNEL = ((True, True), (False, False))
_SPATIAL = ((True, False), (False, True), (False, False))


@dataclass(frozen=True, eq=False)
class Start:
    """What a chain begins with, before anything is fitted.

    Attributes:
        vertical: ``h x 1`` filters, float64 `[filters, channels, height, 1]`; None without.
        prior: float64 `[outputs, features]`, the map from features to responses that follows of the
            layer's weight.
    """

    vertical: Tensor | None
    prior: Tensor

    def features(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """Makes features `[features, samples]` of inputs at sampled positions.

        They are what the ``h x 1`` filters give, or the layer's own responses without bias.
        """
        vertical = self.vertical
        if vertical is None:
            return lambda taps: respond(layer, taps)
        filters = vertical.float().flatten(1)
        return lambda taps: _through(filters, taps)


def start_of(layer: Layer, ranks: Ranks, observed: Observed | None) -> Start:
    """The first step of a chain."""
    if ranks.spatial is None:
        return Start(None, torch.eye(layer.shape.outputs, dtype=torch.float64))
    filters = vertical_factors(layer, observed)[0][: ranks.spatial]
    matrix = vertical_matrix(layer.weight)
    # The filters are orthogonal in the metric of the inputs, if at all: least squares in general.
    spread = _spread(layer, observed)
    second = filters @ spread @ filters.mT
    cross = filters @ spread @ matrix
    after = torch.linalg.lstsq(second, cross, driver="gelsd").solution
    shape = (ranks.spatial, layer.shape.inputs, layer.shape.kernel[0], 1)
    horizontal = horizontal_weight(after, layer.shape.kernel[1])
    return Start(filters.reshape(shape), horizontal.flatten(1))


def chain_of_weights(layer: Layer, ranks: Ranks) -> Chain:
    """The chain nearest to the weight itself, by truncated singular value decompositions."""
    start = start_of(layer, ranks, None)
    prior = start.prior if start.vertical is not None else layer.rows
    bias = bias_of(layer).double().squeeze(1) if layer.operation.bias is not None else None
    if ranks.channel is None or ranks.channel >= min(prior.shape):
        return _chain(layer, start, None, prior, bias)
    left, values, right = torch.linalg.svd(prior, full_matrices=False)
    root = values[: ranks.channel].sqrt()
    outer, inner = left[:, : ranks.channel] * root, root.unsqueeze(1) * right[: ranks.channel]
    return _chain(layer, start, outer, inner, bias)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A chain that was fitted to responses.

    Attributes:
        chain: the chain.
        error: squared error of its responses on the samples, over the squares of those wanted,
            after the ReLU if there is one.
        scarce: whether there were too few samples for its features.
    """

    chain: Chain
    error: float
    scarce: bool


def fit_chain(
    layer: Layer,
    ranks: Ranks,
    start: Start,
    features: Tensor,
    observed: Observed,
    schedule: Schedule | None,
) -> Fitted:
    """Fit a chain to the responses of the original network.

    Args:
        layer: the layer.
        ranks: how wide the chain is.
        start: its first step.
        features: of the samples, as `Start.features` makes them; used up.
        observed: the responses wanted.
        schedule: for responses that only a ReLU reads; None to reproduce them as they are.
    """
    regression = Regression(features, start.prior)
    found = solve(regression, observed.responses, ranks.channel, schedule)
    error = relative_error(regression, found, observed.responses, rectified=layer.rectified)
    return Fitted(_of_map(layer, start, found), error, regression.scarce)


def _of_map(layer: Layer, start: Start, found: LowRankMap) -> Chain:
    inner = found.inner
    if start.vertical is None:
        inner = inner @ layer.rows
    return _chain(layer, start, found.outer, inner, found.bias)


def _chain(
    layer: Layer, start: Start, outer: Tensor | None, inner: Tensor, bias: Tensor | None
) -> Chain:
    """The chain of a first step and a map, `inner` being `[rank or outputs, inputs * taps]`."""
    weights = []
    takes: tuple[tuple[bool, bool], ...] = _CHANNEL
    if start.vertical is not None:
        weights.append(start.vertical)
        shape = (len(inner), start.vertical.shape[0], 1, layer.shape.kernel[1])
        takes = _SPATIAL
    else:
        shape = (len(inner), *layer.candidate.weight.shape[1:])
    weights.append(inner.reshape(shape))
    if outer is not None:
        weights.append(outer if layer.linear else outer.unsqueeze(2).unsqueeze(3))
    return Chain(balanced(weights), bias, takes[: len(weights)])


def _through(filters: Tensor, taps: Tensor) -> Tensor:
    """Outputs of ``h x 1`` filters `[s, c * h]` in each column of taps, `[s * width, samples]`."""
    columns = taps.permute(1, 2, 3, 0).flatten(0, 1).flatten(1)
    found = filters @ columns
    return found.reshape(len(filters) * taps.shape[3], -1)


def _spread(layer: Layer, observed: Observed | None) -> Tensor:
    if observed is None or observed.moments is None:
        size = layer.shape.inputs * layer.shape.kernel[0]
        return torch.eye(size, dtype=torch.float64)
    return observed.moments
