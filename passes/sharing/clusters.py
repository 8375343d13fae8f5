"""Exact k-means of numbers on a line, in near-linear time.

The numbers are sorted once. A cluster is then a range, its sum a difference of prefix sums, and
its bounds are found by bisection: a step of Lloyd's algorithm takes ``k log n`` operations, not
``k n``.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shohin.errors import SpecError

Initialisation: TypeAlias = Literal["linear", "density", "random"]
Floats: TypeAlias = NDArray[np.floating]

_BINS = 1 << 16
_MOST_STEPS = 20_000
_MOST_LAST_STEPS = 200
_MOST_REFILLS = 8


@dataclass(frozen=True, eq=False)
class Clusters:
    """What the clustering of `n` numbers gave.

    Attributes:
        centroids: float32, ascending and different; no cluster is empty.
        indices: uint8 ``[n]``, of the nearest centroid; of two equally near ones the lower.
    """

    centroids: NDArray[np.float32]
    indices: NDArray[np.uint8]


def cluster(
    numbers: NDArray[np.float32],
    most: int,
    *,
    start: Initialisation = "linear",
    importance: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> Clusters:
    """Find centroids so that ``sum importance * (number - nearest centroid)^2`` is small.

    Lloyd's algorithm from a start of Deep Compression's section 3.2, until the centroids stand
    still: first over some thousand ranges of numbers, whose sums fit into a cache, then over the
    numbers themselves. A cluster that becomes empty is given half of the one that spreads most.

    Args:
        numbers: finite float32 ``[n]``, n at least 1, in any order.
        most: number of clusters to start from, 1 to 256.
        start: ``linear`` spreads the first centroids evenly from the least to the largest number,
            ``density`` evenly over their ranks, and ``random`` takes some of the numbers.
        importance: positive weights of the numbers; all alike where there are none.
        seed: of ``random``.

    Raises:
        SpecError: when `most` is out of range.
    """
    if not 1 <= most <= 256:
        raise SpecError("clusters", f"expected 1 to 256, got {most}")
    line = _Line.of(numbers, importance)
    centroids = _START[start](line.numbers, most, np.random.default_rng(seed))
    if line.numbers.size <= 2 * _BINS:
        centroids = _settle(line, centroids, most)
    else:
        centroids = _settle(line.binned(), centroids, most)
        centroids = _lloyd(line, centroids, _MOST_LAST_STEPS)
    rounded = np.unique(centroids.astype(np.float32))
    used = np.flatnonzero(np.diff(line.bounds(rounded)))
    final = rounded[used]
    return Clusters(final, nearest(numbers, final))


def nearest(numbers: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Index of the nearest of ascending centroids; of two equally near ones the lower."""
    return np.searchsorted(_middles(centroids), numbers, side="left").astype(np.uint8)


def _settle(line: "_Line", centroids: Floats, most: int) -> Floats:
    """Lloyd's algorithm, begun again with the widest clusters split while some are empty."""
    centroids = _lloyd(line, centroids, _MOST_STEPS)
    for _ in range(_MOST_REFILLS):
        if centroids.size >= most:
            break
        fuller = _split_widest(line, centroids, most - centroids.size)
        if fuller.size == centroids.size:
            break
        centroids = _lloyd(line, fuller, _MOST_STEPS)
    return centroids


def _split_widest(line: "_Line", centroids: Floats, most: int) -> Floats:
    """Centroids with those of a few clusters replaced by one for each half of their range."""
    bounds = line.bounds(centroids)
    first = np.minimum(bounds[:-1], line.numbers.size - 1)
    least, largest = line.numbers[first], line.numbers[bounds[1:] - 1]
    spread = np.diff(bounds) * (largest.astype(np.float64) - least) ** 2
    widest = np.argsort(-spread, kind="stable")[:most]
    chosen = widest[spread[widest] > 0]
    quarter = (largest[chosen].astype(np.float64) - least[chosen]) / 4
    middle = (largest[chosen].astype(np.float64) + least[chosen]) / 2
    kept = np.delete(centroids.astype(np.float64), chosen)
    return np.sort(np.concatenate([kept, middle - quarter, middle + quarter]))


def _lloyd(line: "_Line", centroids: Floats, most: int) -> Floats:
    bounds = line.bounds(centroids)
    for _ in range(most):
        centroids, last = line.means(bounds), bounds
        bounds = line.bounds(centroids)
        if np.array_equal(bounds, last):
            break
    return centroids


@dataclass(frozen=True, eq=False)
class _Line:
    """Sorted numbers with prefix sums of their weights and of the weighted numbers, from 0 on."""

    numbers: Floats
    weights: Floats | None
    sums: NDArray[np.float64]

    @classmethod
    def of(cls, numbers: Floats, importance: Floats | None) -> "_Line":
        if importance is None:
            ordered = np.sort(numbers)
            return cls(ordered, None, _prefix_sums(ordered))
        order = np.argsort(numbers, kind="stable")
        ordered, weights = numbers[order], importance[order].astype(np.float64)
        return cls(ordered, _prefix_sums(weights), _prefix_sums(ordered * weights))

    def binned(self) -> "_Line":
        """The line seen as ranges of equal length or equally many numbers, whichever is less."""
        size, least, largest = self.numbers.size, self.numbers[0], self.numbers[-1]
        evenly = np.linspace(0, size, _BINS + 1).astype(np.intp)
        along = np.searchsorted(self.numbers, np.linspace(least, largest, _BINS + 1))
        edges = np.union1d(evenly, along)
        weights = edges.astype(np.float64) if self.weights is None else self.weights[edges]
        return _Line(self.numbers[edges[1:] - 1], weights, self.sums[edges])

    def bounds(self, centroids: Floats) -> NDArray[np.intp]:
        """Where the cluster of each centroid begins, and the end; clusters may be empty."""
        inner = np.searchsorted(self.numbers, _middles(centroids), side="right")
        return np.concatenate([[0], inner, [self.numbers.size]])

    def means(self, bounds: NDArray[np.intp]) -> NDArray[np.float64]:
        """Means of the clusters that are not empty."""
        kept = bounds[np.concatenate([[True], np.diff(bounds) > 0])]
        counts = np.diff(kept if self.weights is None else self.weights[kept])
        found: NDArray[np.float64] = np.diff(self.sums[kept]) / counts
        return found


def _prefix_sums(values: Floats) -> NDArray[np.float64]:
    sums = np.empty(values.size + 1, np.float64)
    sums[0] = 0.0
    np.cumsum(values, dtype=np.float64, out=sums[1:])
    return sums


def _middles(centroids: Floats) -> NDArray[np.float32]:
    """The largest float32 numbers not above the middles between neighbours.

    Float32 numbers compare with them as with the middles themselves, and need no conversion.
    """
    exact = centroids.astype(np.float64)
    middles = exact[:-1] + np.diff(exact) / 2
    rounded = middles.astype(np.float32)
    lower = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(rounded > middles, lower, rounded)


def _linear(ordered: Floats, most: int, generator: np.random.Generator) -> Floats:
    return np.linspace(float(ordered[0]), float(ordered[-1]), most)


def _density(ordered: Floats, most: int, generator: np.random.Generator) -> Floats:
    ranks = ((np.arange(most) + 0.5) / most * ordered.size).astype(np.int64)
    return ordered[ranks]


def _random(ordered: Floats, most: int, generator: np.random.Generator) -> Floats:
    count = min(most, ordered.size)
    return ordered[np.sort(generator.choice(ordered.size, count, replace=False))]


_START = {"linear": _linear, "density": _density, "random": _random}
