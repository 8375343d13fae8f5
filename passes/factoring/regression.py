"""Linear maps of low rank from sampled features to wanted responses, in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 1e-6
"""Pull to the map there was, over the mean variance of a feature."""

SCARCE_DAMPING = 1e-2
"""The same where there are fewer than `SAMPLES_PER_FEATURE` samples for each feature."""

SAMPLES_PER_FEATURE = 2
_PIECE = 1024  # samples at a time, few enough for a cache
_NEGLIGIBLE = 1e-12
_LARGE, _MORE, _ITERATIONS = 1024, 32, 8  # of subspace iteration


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """The map ``outer @ inner @ x + bias``.

    Attributes:
        outer: float64 `[outputs, rank]`; None for a map whose rank is not reduced.
        inner: float64 `[rank or outputs, features]`.
        bias: float64 `[outputs]`.
    """

    outer: Tensor | None
    inner: Tensor
    bias: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Responses `[outputs, samples]` to features of that element type."""
        found = self.inner.to(features.dtype) @ features
        if self.outer is not None:
            found = self.outer.to(features.dtype) @ found
        return found + self.bias.to(features.dtype).unsqueeze(1)


class Regression:
    """Fits maps of low rank from the same features to one set of targets after another.

    The squared error is least over all maps of a rank: reduced rank regression, by the generalised
    singular value decomposition of the solution of full rank (Zhang et al., arXiv 1505.06798,
    equations 8 to 11). Features that hardly vary, or depend on each other, leave the solution open;
    the damping then holds it to the map there was.

    Args:
        features: float32 `[features, samples]`; kept, and centred in place.
        prior: float64 `[outputs, features]`, the map there was.

    Attributes:
        count: number of samples.
        mean: mean of the features, float64.
        centred: the features without it.
        scarce: whether there are too few samples, so that they are damped more.
    """

    def __init__(self, features: Tensor, prior: Tensor) -> None:
        self.count = features.shape[1]
        rounded = features.double().mean(1).float()
        self.centred = features.sub_(rounded.unsqueeze(1))
        # What rounding left of the mean would reach the cross moments.
        self.mean = rounded.double() + self.centred.double().mean(1)
        self._prior = prior
        second = second_moments(self.centred)
        self.scarce = self.count < SAMPLES_PER_FEATURE * len(features)
        damping = SCARCE_DAMPING if self.scarce else DAMPING
        self._pull = damping * float(second.diagonal().mean()) or 1.0
        second.diagonal().add_(self._pull)
        self._factor = torch.linalg.cholesky(second)

    def fit(self, cross: Tensor, mean: Tensor, rank: int | None) -> LowRankMap:
        """The map of least squared error.

        Args:
            cross: float64 `[outputs, features]`, sum of targets times centred features.
            mean: float64 `[outputs]`, mean of the targets.
            rank: most rank; None for no limit.
        """
        pulled = cross + self._pull * self._prior
        whitened = torch.linalg.solve_triangular(self._factor, pulled.mT, upper=False)
        full = torch.linalg.solve_triangular(self._factor.mT, whitened, upper=True).mT
        if rank is None:
            return LowRankMap(None, full, mean - full @ self.mean)
        values, kept = _leading(whitened.mT @ whitened, rank)
        strengths = values.clamp_min(0).sqrt().sqrt()
        usable = strengths > _NEGLIGIBLE * strengths[0]
        scale = torch.where(usable, strengths, 1.0)
        outer, inner = kept * scale, (kept.mT @ full) / scale.unsqueeze(1)
        return LowRankMap(outer, inner, mean - outer @ (inner @ self.mean))

    def moments(self, targets: Callable[[slice], Tensor]) -> tuple[Tensor, Tensor]:
        """What `fit` needs to know of targets: their cross moments with features, and their mean.

        Args:
            targets: gives float32 `[outputs, samples]` for a range of samples.
        """
        cross = torch.zeros_like(self._prior)
        total = torch.zeros(len(cross), dtype=torch.float64)
        for part in parts(self.count):
            wanted = targets(part)
            cross += (wanted @ self.centred[:, part].mT).double()
            total += wanted.double().sum(1)
        return cross, total / self.count

    def predict(self, found: LowRankMap, part: slice) -> Tensor:
        """Responses of a map that `fit` gave to the features of a range of samples."""
        centred = LowRankMap(found.outer, found.inner, found.bias + _offset(found, self.mean))
        return centred.apply(self.centred[:, part])


def parts(count: int) -> Iterator[slice]:
    """Ranges of samples that are looked at together."""
    return (slice(start, start + _PIECE) for start in range(0, count, _PIECE))


def second_moments(columns: Tensor) -> Tensor:
    """Sum of ``x x^T`` over the columns of a matrix, in float64 without a copy of all of it."""
    total = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for part in parts(columns.shape[1]):
        # Features may depend on each other: the rounding of single precision would show.
        piece = columns[:, part].double()
        total += piece @ piece.mT
    return total


def _leading(second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, descending, and their eigenvectors.

    Of a large matrix by subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4), which
    takes the part of the time that the rank is of the size.
    """
    wide = rank + _MORE
    if len(second) <= _LARGE or 2 * wide > len(second):
        values, vectors = torch.linalg.eigh(second)
        return values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(second), wide, generator=generator, dtype=second.dtype)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(second @ basis).Q
    values, vectors = torch.linalg.eigh(basis.mT @ second @ basis)
    return values.flip(0)[:rank], (basis @ vectors).flip(1)[:, :rank]


def _offset(found: LowRankMap, mean: Tensor) -> Tensor:
    moved = found.inner @ mean
    return moved if found.outer is None else found.outer @ moved
