import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.errors import SpecError
from shohin.passes.sharing.clusters import cluster, nearest

STARTS = ("linear", "density", "random")


def normal(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def error(numbers, found):
    return float(np.square(numbers - found.centroids[found.indices], dtype=np.float64).sum())


def brute_force(numbers, centroids):
    distances = np.abs(numbers.astype(np.float64)[:, None] - centroids.astype(np.float64))
    return distances.argmin(1)


@settings(deadline=None)
@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60),
    st.integers(1, 16),
    st.sampled_from(STARTS),
)
def test_every_number_goes_to_the_nearest_centroid(numbers, most, start):
    values = np.array(numbers, np.float32)
    found = cluster(values, most, start=start)
    assert 1 <= found.centroids.size <= most
    assert (np.diff(found.centroids) > 0).all()
    assert set(found.indices.tolist()) == set(range(found.centroids.size))
    assert np.array_equal(found.indices, brute_force(values, found.centroids))


@pytest.mark.parametrize("start", STARTS)
def test_centroids_are_the_means_of_their_clusters(start):
    numbers = normal(50_000)
    found = cluster(numbers, 16, start=start)
    means = [numbers[found.indices == i].mean(dtype=np.float64) for i in range(16)]
    assert np.allclose(found.centroids, means, atol=1e-4)


def test_the_error_is_that_of_lloyd_max_quantisers():
    # Max, "Quantizing for minimum distortion", 1960, table I: least mean square errors of a
    # normal variable by 2, 4, 8, 16 and 32 levels.
    numbers = normal(400_000)
    for levels, least in ((2, 0.3634), (4, 0.1175), (8, 0.03454), (16, 0.009497), (32, 0.002499)):
        found = cluster(numbers, levels, start="density")
        assert error(numbers, found) / numbers.size == pytest.approx(least, rel=0.02)


def test_no_cluster_stays_empty():
    # Nothing around zero, as after pruning: half of an even start finds no number.
    numbers = normal(20_000)
    numbers = numbers[np.abs(numbers) > 2]
    found = cluster(numbers, 16)
    assert found.centroids.size == 16
    halves = [cluster(part, 8) for part in (numbers[numbers < 0], numbers[numbers > 0])]
    apart = sum(
        error(part, half)
        for part, half in zip((numbers[numbers < 0], numbers[numbers > 0]), halves, strict=True)
    )
    assert error(numbers, found) < 1.1 * apart


def test_few_different_numbers_come_back_exactly():
    numbers = np.array([0.1, -3.5, 0.1, 7.25, -3.5], np.float32)
    found = cluster(numbers, 8)
    assert found.centroids.tolist() == np.array([-3.5, 0.1, 7.25], np.float32).tolist()
    assert np.array_equal(found.centroids[found.indices], numbers)


def test_importance_pulls_centroids():
    numbers = np.array([0, 1, 10, 11], np.float32)
    importance = np.array([1, 3, 1, 1], np.float32)
    found = cluster(numbers, 2, importance=importance)
    assert found.centroids.tolist() == [0.75, 10.5]


def test_the_seed_decides_the_random_start():
    numbers = normal(2000)
    same, again, other = (cluster(numbers, 32, start="random", seed=s) for s in (1, 1, 2))
    assert np.array_equal(same.centroids, again.centroids)
    assert not np.array_equal(same.centroids, other.centroids)


@pytest.mark.parametrize("start", STARTS)
def test_what_is_found_for_many_numbers_is_as_good_as_for_some(start):
    numbers = normal(600_000)
    few, many = (cluster(part, 32, start=start) for part in (numbers[:100_000], numbers))
    assert error(numbers, many) / 6 < 1.03 * error(numbers[:100_000], few)


def test_equally_near_centroids():
    centroids = np.array([-1, 1, 3], np.float32)
    numbers = np.array([0, 2, np.nextafter(np.float32(2), np.float32(3))], np.float32)
    assert nearest(numbers, centroids).tolist() == [0, 1, 2]


@pytest.mark.parametrize("most", [0, 257])
def test_the_number_of_clusters_has_limits(most):
    with pytest.raises(SpecError, match=f"clusters: expected 1 to 256, got {most}"):
        cluster(normal(5), most)
