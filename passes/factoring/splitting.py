"""One layer made a chain: the filters of its first step, and the map of low rank after them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shohin.passes.factoring.energies import column_moments, first_filters, pixel_moments
from shohin.passes.factoring.factors import (
    Chain,
    Ranks,
    balanced,
    horizontal_weight,
    inner_matrix,
    vertical_matrix,
    windowed_weight,
)
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.regression import Regression
from shohin.passes.factoring.responses import Observed, bias_of, respond
from shohin.passes.factoring.solvers import Schedule, relative_error, solve

Solver: TypeAlias = Literal["weights", "linear", "nonlinear", "asymmetric"]


@dataclass(frozen=True, eq=False)
class Start:
    """What a chain begins with, before anything is fitted.

    Attributes:
        first: ``h x 1`` or ``1 x 1`` filters, float64 `[filters, channels, height, 1]`; None for a
            chain that begins with what is fitted.
        prior: float64 `[outputs, features]`, the map from features to responses that follows of the
            layer's weight.
    """

    first: Tensor | None
    prior: Tensor

    def features(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """Makes features `[features, samples]` of inputs at sampled positions.

        They are what the first filters give, or the layer's own responses without bias.
        """
        if self.first is None:
            return lambda taps: respond(layer, taps)
        filters = self.first.float()
        return lambda taps: _through(filters, taps)


def start_of(layer: Layer, ranks: Ranks, observed: Observed | None) -> Start:
    """The first step of a chain."""
    weight, kernel = layer.weight, layer.shape.kernel
    if ranks.inner is not None:
        moments, matrix = pixel_moments(layer, observed), inner_matrix(weight)
        filters = first_filters(matrix, moments, ranks.inner)
        after = windowed_weight(_rest(filters, moments, matrix), kernel)
        return Start(filters.unsqueeze(2).unsqueeze(3), after.flatten(1))
    if ranks.spatial is not None:
        moments, matrix = column_moments(observed), vertical_matrix(weight)
        filters = first_filters(matrix, moments, ranks.spatial)
        after = horizontal_weight(_rest(filters, moments, matrix), kernel[1])
        shape = (ranks.spatial, layer.shape.inputs, kernel[0], 1)
        return Start(filters.reshape(shape), after.flatten(1))
    return Start(None, torch.eye(layer.shape.outputs, dtype=torch.float64))


def _rest(filters: Tensor, moments: Tensor | None, matrix: Tensor) -> Tensor:
    """What filters have to be followed by to be nearest to a weight, by least squares."""
    weighted = filters if moments is None else filters @ moments
    solved: Tensor = torch.linalg.lstsq(weighted @ filters.mT, weighted @ matrix, driver="gelsd")[0]
    return solved


def chain_of_weights(layer: Layer, ranks: Ranks) -> Chain:
    """The chain nearest to the weight itself, by truncated singular value decompositions."""
    start = start_of(layer, ranks, None) if ranks != Ranks(ranks.channel) else None
    first, rows = (None, layer.rows) if start is None else (start.first, start.prior)
    bias = bias_of(layer).double().squeeze(1) if layer.operation.bias is not None else None
    if ranks.channel is None:
        return _chain(layer, ranks, [first, rows], bias)
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    root = values[: ranks.channel].sqrt()
    outer, inner = left[:, : ranks.channel] * root, root.unsqueeze(1) * right[: ranks.channel]
    return _chain(layer, ranks, [first, inner, outer], bias)


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
    inner = found.inner if start.first is not None else found.inner @ layer.rows
    chain = _chain(layer, ranks, [start.first, inner, found.outer], found.bias)
    return Fitted(chain, error, regression.scarce)


def _chain(
    layer: Layer, ranks: Ranks, weights: Sequence[Tensor | None], bias: Tensor | None
) -> Chain:
    """The chain of some weights, given as matrices or in their shape; None for steps it has not."""
    steps = layer.shape.steps(ranks)
    there = [weight for weight in weights if weight is not None]
    shaped = [
        weight.reshape(step.outputs, step.inputs, *step.kernel(layer.shape.kernel))
        for weight, step in zip(there, steps, strict=True)
    ]
    if layer.linear:
        shaped = [weight.flatten(1) for weight in shaped]
    return Chain(balanced(shaped), bias, tuple(steps))


def _through(filters: Tensor, taps: Tensor) -> Tensor:
    """What filters `[f, c, height or 1, 1]` give in all taps `[samples, c, height, width]`."""
    equation = "fi,nihw->fhwn" if filters.shape[2] == 1 else "fih,nihw->fwn"
    given = filters.flatten(1) if filters.shape[2] == 1 else filters.squeeze(3)
    return torch.einsum(equation, given, taps).reshape(-1, len(taps))
