"""Ternary weights of least squared error of a layer's responses, without training.

The threshold is a share of the mean absolute weight, of the row or of the layer; for each of a few
shares the scales of least error are the solution of a least-squares problem, and the share of least
error is taken. (Li and Liu, "Ternary Weight Networks", arXiv 1605.04711, do so for the error of the
weights.) Elements can then make up for each other's rounding, one column after the other, as in
GPTQ (arXiv 2210.17323), and the scales are fitted to the codes that come of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shohin.passes.pruning.surgeon import Problem
from shohin.passes.sharing.compensation import inverse_factor

Scales: TypeAlias = Literal["row", "layer"]

SHARES = tuple(0.1 * step for step in range(1, 14))
"""Thresholds that are tried, over the mean absolute weight; 0.7 is best for normal weights."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Ternary rows.

    Attributes:
        codes: int8 `[rows, inputs]`.
        pairs: what 1 and -1 stand for, float64 `[rows, 2]`, the second without its sign.
        gain: what the rows take off the squared responses, float64 `[rows]`; the error is what is
            left.
    """

    codes: Tensor
    pairs: Tensor
    gain: Tensor


@dataclass(frozen=True, eq=False)
class Plain:
    """The problem of a layer whose responses are not looked at: errors of all weights count alike.

    Attributes:
        start: the rows, floating-point `[rows, inputs]`.
    """

    start: Tensor

    @property
    def target(self) -> Tensor:
        """The rows times the identity."""
        return self.start


def fit_ternary(problem: Problem, scales: Scales, *, compensate: bool) -> Fit:
    """The ternary rows of a layer.

    Args:
        problem: of weights alone.
        scales: ``row`` for one value of each row, ``layer`` for two of the layer.
        compensate: whether elements make up for the rounding of others.
    """
    best = best_threshold(problem, scales)
    if not compensate:
        return best
    other = fit_scales(problem, assign(problem, best.pairs).codes, scales)
    better = other.gain > best.gain if scales == "row" else other.gain.sum() > best.gain.sum()
    return _merged(best, other, better.expand(len(best.gain)))


def fit_scales(problem: Problem | Plain, codes: Tensor, scales: Scales) -> Fit:
    """The scales of least error for given codes.

    Args:
        problem: of weights alone.
        codes: int8 `[rows, inputs]`.
        scales: of each row, or of the layer.
    """
    signs = codes.to(problem.start.dtype)
    if scales == "row":
        right, system = _dots(signs, problem.target), _forms(problem, signs, signs)
        values = torch.where(system > 0, right / system, 0.0).clamp_min(0.0)
        return Fit(codes, values.unsqueeze(1).expand(-1, 2), values * right)
    above, below = signs.clamp_min(0), -signs.clamp_max(0)
    right = torch.stack([_dots(above, problem.target), -_dots(below, problem.target)], 1)
    squares = torch.stack([_forms(problem, part, part) for part in (above, below)], 1)
    mixed = _forms(problem, above, below)
    pair = _best_pair(squares.sum(0), -mixed.sum(), right.sum(0))
    cost = squares @ pair**2 - 2 * pair.prod() * mixed
    return Fit(codes, pair.expand(len(codes), 2), 2 * right @ pair - cost)


def _best_pair(own: Tensor, mixed: Tensor, right: Tensor) -> Tensor:
    """The two values, at least 0, of least squared error.

    Args:
        own: diagonal of the matrix, `[2]`.
        mixed: what stands beside it.
        right: the right side, `[2]`.
    """
    system = torch.stack([own[0], mixed, mixed, own[1]]).view(2, 2)
    pair: Tensor = torch.linalg.lstsq(system, right.unsqueeze(1), driver="gelsd").solution[:, 0]
    if bool((pair >= 0).all()):
        return pair
    # Then one of them is 0 and the other at its own best.
    alone = torch.where(own > 0, right / own, 0.0).clamp_min(0.0)
    best: Tensor = torch.diag(alone)[(alone * right).argmax()]
    return best


def best_threshold(problem: Problem | Plain, scales: Scales) -> Fit:
    """The fit of that threshold that has the least error.

    Args:
        problem: of weights alone.
        scales: ``row`` for a threshold of each row, ``layer`` for one of the layer.
    """
    best: Fit | None = None
    for codes in _thresholded(problem.start, scales):
        found = fit_scales(problem, codes, scales)
        if best is None:
            best = found
            continue
        better = found.gain > best.gain if scales == "row" else found.gain.sum() > best.gain.sum()
        best = _merged(best, found, better.expand(len(best.gain)))
    if best is None:
        raise AssertionError("there are shares to try")
    return best


def _thresholded(rows: Tensor, scales: Scales) -> Iterator[Tensor]:
    """The codes for every threshold."""
    sizes = rows.abs()
    mean = sizes.mean(1, keepdim=True) if scales == "row" else sizes.mean()
    for share in SHARES:
        yield (rows.sign() * (sizes > share * mean)).to(torch.int8)


def _merged(one: Fit, other: Fit, better: Tensor) -> Fit:
    """Rows of `other` where it is better."""
    rows = better.unsqueeze(1)
    return Fit(
        torch.where(rows, other.codes, one.codes),
        torch.where(rows, other.pairs, one.pairs),
        torch.where(better, other.gain, one.gain),
    )


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Products of rows: float64 `[rows]`."""
    return (left * right).sum(1, dtype=torch.float64)


def _forms(problem: Problem | Plain, left: Tensor, right: Tensor) -> Tensor:
    """``left H right`` of each row: float64 `[rows]`."""
    if isinstance(problem, Plain):
        return _dots(left, right)
    found = torch.empty(len(left), dtype=torch.float64)
    for group, hessian in enumerate(problem.hessian):
        rows = problem.groups == group
        found[rows] = _dots(left[rows] @ hessian, right[rows])
    return found


@dataclass(frozen=True, eq=False)
class Assigned:
    """Ternary rows whose elements make up for each other's rounding.

    Attributes:
        codes: int8 `[rows, inputs]`.
        values: what each element was when it was rounded, float64 of that shape.
    """

    codes: Tensor
    values: Tensor


def assign(problem: Problem, pairs: Tensor) -> Assigned:
    """Round one column after the other to the nearest values, those after it making up for it.

    Args:
        problem: of weights alone.
        pairs: what 1 and -1 stand for, `[rows, 2]`, the second without its sign.
    """
    codes = torch.empty(problem.start.shape, dtype=torch.int8)
    values = torch.empty_like(problem.start)
    for group, hessian in enumerate(problem.hessian):
        members = problem.groups == group
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = inverse_factor(hessian[order][:, order])
        rows, (above, below) = problem.start[members][:, order], pairs[members].unbind(1)
        chosen = torch.empty(rows.shape, dtype=torch.int8)
        for column in range(rows.shape[1]):
            value = rows[:, column]
            code = (value > above / 2).to(torch.int8) - (value < -below / 2).to(torch.int8)
            rounded = torch.where(code > 0, above, torch.where(code < 0, -below, 0.0))
            error = (value - rounded) / factor[column, column]
            rows[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
            chosen[:, column] = code
        back = torch.argsort(order)
        codes[members], values[members] = chosen[:, back], rows[:, back]
    return Assigned(codes, values)
