"""The solvers of Zhang et al., "Accelerating Very Deep Convolutional Networks" (arXiv 1505.06798).

The responses of a layer are to be reproduced by a map of low rank, as they are or as a ReLU lets
them through.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.passes.factoring.regression import LowRankMap, Regression, parts

_SETTLED = 1e-4
"""Relative change of the error below which a stage has nothing left to gain."""


@dataclass(frozen=True)
class Schedule:
    """How the relaxed problem is solved.

    Attributes:
        penalties: what the squares of the relaxation's errors count, one for each stage.
        iterations: most iterations of each stage.
    """

    penalties: tuple[float, ...]
    iterations: tuple[int, ...]


def solve(
    regression: Regression,
    wanted: Tensor,
    rank: int | None,
    schedule: Schedule | None,
) -> LowRankMap:
    """The map of a rank whose results are nearest to wanted responses.

    Args:
        regression: of the features.
        wanted: float32 `[outputs, samples]`, the responses before the non-linearity.
        rank: most rank; None for no limit.
        schedule: for responses that a ReLU reads; None to reproduce them as they are.
    """
    cross, mean = regression.moments(lambda part: wanted[:, part])
    linear = regression.fit(cross, mean, rank)
    if schedule is None:
        return linear
    return _alternate(regression, wanted, rank, schedule, linear)


def relative_error(
    regression: Regression, found: LowRankMap, wanted: Tensor, *, rectified: bool
) -> float:
    """Squared error of responses over the squares of the wanted ones, after a ReLU or without."""
    error = total = 0.0
    for part in parts(regression.count):
        y, z = wanted[:, part], regression.predict(found, part)
        if rectified:
            y, z = y.clamp_min(0), z.clamp_min(0)
        error += float((y - z).square().sum(dtype=torch.float64))
        total += float(y.square().sum(dtype=torch.float64))
    return error / total if total else 0.0


def _alternate(
    regression: Regression,
    wanted: Tensor,
    rank: int | None,
    schedule: Schedule,
    start: LowRankMap,
) -> LowRankMap:
    """Alternate between the map and the relaxed responses (equation 6 of the paper).

    The best map by the error after the ReLU is kept, as the relaxed problem may drift from it.
    """
    best, least, found = start, float("inf"), start
    for penalty, count in zip(schedule.penalties, schedule.iterations, strict=True):
        before = float("inf")
        for _ in range(count):
            relaxation = _Relaxation(regression, wanted, found, penalty)
            cross, mean = regression.moments(relaxation)
            if relaxation.error < least:
                best, least = found, relaxation.error
            if abs(before - relaxation.error) <= _SETTLED * relaxation.error:
                break
            before = relaxation.error
            found = regression.fit(cross, mean, rank)
    last = _Relaxation(regression, wanted, found, 1.0)
    regression.moments(last)
    return found if last.error < least else best


class _Relaxation:
    """Auxiliary responses `z` between what is wanted and what a map gives, element by element.

    They minimise ``(r(y) - r(z))^2 + penalty (z - y')^2`` with `r` the ReLU, `y` the wanted and
    `y'` the given response (equation 7 of the paper).

    Attributes:
        error: squared error of the map after the ReLU, over the samples asked for so far.
    """

    def __init__(
        self, regression: Regression, wanted: Tensor, found: LowRankMap, penalty: float
    ) -> None:
        self._regression, self._wanted = regression, wanted
        self._found, self._penalty = found, penalty
        self.error = 0.0

    def __call__(self, part: slice) -> Tensor:
        given = self._regression.predict(self._found, part)
        target = self._wanted[:, part].clamp_min(0)
        self.error += float((target - given.clamp_min(0)).square().sum(dtype=torch.float64))
        return relaxed(target, given, self._penalty)


def relaxed(target: Tensor, given: Tensor, penalty: float) -> Tensor:
    """The auxiliary responses.

    Args:
        target: wanted responses after the ReLU.
        given: responses of the map.
        penalty: what ``(z - given)^2`` counts.
    """
    negative = given.clamp_max(0)
    positive = ((penalty * given + target) / (penalty + 1)).clamp_min(0)
    negative_cost = target.square() + penalty * (negative - given).square()
    positive_cost = (positive - target).square() + penalty * (positive - given).square()
    return torch.where(negative_cost <= positive_cost, negative, positive)
