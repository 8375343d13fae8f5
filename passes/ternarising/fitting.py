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


def fit_ternary(problem: Problem, scales: Scales, *, compensate: bool) -> Fit:
    """The ternary rows of a layer.

    Args:
        problem: of weights alone.
        scales: ``row`` for one value of each row, ``layer`` for two of the layer.
        compensate: whether elements make up for the rounding of others.
    """
    best = _best_threshold(problem, scales)
    if not compensate:
        return best
    other = fit_scales(problem, _assign(problem, best.pairs), scales)
    better = other.gain > best.gain if scales == "row" else other.gain.sum() > best.gain.sum()
    return _merged(best, other, better.expand(len(best.gain)))


def fit_scales(problem: Problem, codes: Tensor, scales: Scales) -> Fit:
    """The scales of least error for given codes.

    Args:
        problem: of weights alone.
        codes: int8 `[rows, inputs]`.
        scales: of each row, or of the layer.
    """
    signs = codes.double()
    if scales == "row":
        right, system = (signs * problem.target).sum(1), _forms(problem, signs, signs)
        values = torch.where(system > 0, right / system, 0.0).clamp_min(0.0)
        return Fit(codes, values.unsqueeze(1).expand(-1, 2), values * right)
    above, below = signs.clamp_min(0), -signs.clamp_max(0)
    right = torch.stack([(above * problem.target).sum(1), -(below * problem.target).sum(1)], 1)
    mixed = -_forms(problem, above, below).sum()
    own = [_forms(problem, part, part).sum() for part in (above, below)]
    system = torch.stack([own[0], mixed, mixed, own[1]]).view(2, 2)
    pair = torch.linalg.lstsq(system, right.sum(0).unsqueeze(1), driver="gelsd").solution[:, 0]
    pair = pair.clamp_min(0.0)
    squares = [_forms(problem, part, part) for part in (above, below)]
    cost = pair[0] ** 2 * squares[0] + pair[1] ** 2 * squares[1]
    cost = cost - 2 * pair[0] * pair[1] * _forms(problem, above, below)
    return Fit(codes, pair.expand(len(codes), 2), 2 * right @ pair - cost)


def _best_threshold(problem: Problem, scales: Scales) -> Fit:
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


def _forms(problem: Problem, left: Tensor, right: Tensor) -> Tensor:
    """``left H right`` of each row: float64 `[rows]`."""
    found = torch.empty(len(left), dtype=torch.float64)
    for group, hessian in enumerate(problem.hessian):
        rows = problem.groups == group
        found[rows] = ((left[rows] @ hessian) * right[rows]).sum(1)
    return found


def _assign(problem: Problem, pairs: Tensor) -> Tensor:
    """The codes when each rounding is made up for by the elements after it: int8."""
    found = torch.empty(problem.start.shape, dtype=torch.int8)
    for group, hessian in enumerate(problem.hessian):
        members = problem.groups == group
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        factor = inverse_factor(hessian[order][:, order])
        rows, (above, below) = problem.start[members][:, order], pairs[members].unbind(1)
        codes = torch.empty(rows.shape, dtype=torch.int8)
        for column in range(rows.shape[1]):
            value = rows[:, column]
            code = (value > above / 2).to(torch.int8) - (value < -below / 2).to(torch.int8)
            rounded = torch.where(code > 0, above, torch.where(code < 0, -below, 0.0))
            error = (value - rounded) / factor[column, column]
            rows[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
            codes[:, order[column]] = code
        found[members] = codes
    return found
