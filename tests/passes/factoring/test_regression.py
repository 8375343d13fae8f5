import pytest
import torch

from shohin.passes.factoring import regression
from shohin.passes.factoring.regression import (
    DAMPING,
    SAMPLES_PER_FEATURE,
    Regression,
)


def data(features=6, outputs=5, samples=400, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(features, samples, generator=generator) + 2
    truth = torch.randn(outputs, features, generator=generator)
    y = truth @ x + noise * torch.randn(outputs, samples, generator=generator) - 1
    return x, y


def fit(x, y, rank, prior=None):
    prior = torch.zeros(len(y), len(x), dtype=torch.float64) if prior is None else prior
    fitted = Regression(x.clone(), prior)
    return fitted, fitted.fit(*fitted.moments(lambda part: y[:, part]), rank)


def error(found, x, y):
    return float((found.apply(x.double()) - y.double()).square().sum())


def least_squares(x, y):
    design = torch.cat([x.double(), torch.ones(1, x.shape[1], dtype=torch.float64)])
    solved = torch.linalg.lstsq(design.mT, y.double().mT).solution.mT
    return solved, solved @ design


def test_without_a_rank_it_is_least_squares():
    x, y = data()
    _, found = fit(x, y, None)
    solved, _ = least_squares(x, y)
    # The damping moves the solution by about its share of the variance.
    assert torch.allclose(found.inner, solved[:, :-1], atol=20 * DAMPING)
    assert torch.allclose(found.bias, solved[:, -1], atol=40 * DAMPING)
    assert found.outer is None


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_error_of_a_rank_is_that_of_the_theory(rank):
    x, y = data()
    _, found = fit(x, y, rank)
    assert found.outer is not None
    assert found.outer.shape == (5, rank)
    _, fitted = least_squares(x, y)
    # Reduced rank regression loses the smallest singular values of the fitted responses.
    lost = torch.linalg.svdvals(fitted - fitted.mean(1, keepdim=True))[rank:].square().sum()
    expected = float((fitted - y).square().sum() + lost)
    assert error(found, x, y) == pytest.approx(expected, rel=1e-5)


def test_no_map_of_that_rank_does_better_nearby():
    x, y = data(seed=3)
    _, found = fit(x, y, 2)
    least = error(found, x, y)
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        moved = found.outer + 0.01 * torch.randn(found.outer.shape, generator=generator)
        turned = found.inner + 0.01 * torch.randn(found.inner.shape, generator=generator)
        mean = y.double().mean(1) - moved @ (turned @ x.double().mean(1))
        assert error(type(found)(moved, turned, mean), x, y) >= least * (1 - 1e-9)


def test_features_that_depend_on_each_other_and_constant_ones_do_not_matter():
    x, y = data()
    doubled = torch.cat([x, x[:2], torch.full((1, x.shape[1]), 7.0)])
    _, found = fit(doubled, y, 3)
    _, alone = fit(x, y, 3)
    assert error(found, doubled, y) == pytest.approx(error(alone, x, y), rel=1e-4)


def test_where_features_say_nothing_the_map_stays_as_it_was():
    x, y = data()
    x[2] = 1.0
    prior = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).double()
    _, found = fit(x, y, None, prior)
    assert torch.allclose(found.inner[:, 2], prior[:, 2], atol=1e-6)


def test_few_samples_hold_the_map_to_what_it_was():
    x, y = data(features=30, samples=10)
    prior = torch.randn(5, 30, generator=torch.Generator().manual_seed(2)).double()
    fitted, found = fit(x, y, None, prior)
    assert fitted.scarce
    # What lies outside of the samples is not touched.
    centred = (x - x.mean(1, keepdim=True)).double()
    outside = torch.eye(30, dtype=torch.float64) - centred @ torch.linalg.pinv(centred, rtol=1e-5)
    assert torch.allclose(found.inner @ outside, prior @ outside, atol=1e-3)
    enough, _ = fit(*data(features=30, samples=30 * SAMPLES_PER_FEATURE), None)
    assert not enough.scarce


def test_predictions_are_those_of_the_map():
    x, y = data(samples=5000)
    fitted, found = fit(x, y, 2)
    part = slice(4000, 4100)
    assert torch.allclose(fitted.predict(found, part), found.apply(x[:, part]), atol=1e-4)


def test_factors_are_balanced():
    x, y = data()
    _, found = fit(x, y, 3)
    centred = (x - x.mean(1, keepdim=True)).double()
    # P = U S^1/2 and Q = V S^1/2 with U and V orthonormal, V in the metric of the features.
    inner = found.inner @ centred
    outer = found.outer.mT @ found.outer
    assert torch.allclose(inner @ inner.mT, outer, rtol=1e-4, atol=1e-6 * float(outer.max()))


def test_leading_components_of_large_matrices():
    """Against the whole decomposition: what is lost beyond the best there is."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(1200, 1200, generator=generator, dtype=torch.float64)).Q
    spectrum = 1 / torch.arange(1, 1201, dtype=torch.float64) ** 2
    second = (axes * spectrum) @ axes.mT
    values, vectors = regression._leading(second, 20)
    assert torch.allclose(values, spectrum[:20], rtol=1e-6)
    assert torch.allclose(vectors.mT @ vectors, torch.eye(20, dtype=torch.float64), atol=1e-9)
    kept = float((vectors.mT @ second @ vectors).trace())
    assert kept == pytest.approx(float(spectrum[:20].sum()), rel=1e-8)
