"""Costs of dropping elements, from a few measurements of a network's outputs."""

import math

import pytest
import torch
from torch.nn import functional

from shohin.passes.pruning.divergence import costs_of, divergence


def test_vectors_are_compared_relative_to_the_variance() -> None:
    torch.manual_seed(0)
    reference, outputs = torch.randn(2, 30, dtype=torch.float64)
    variance = reference.var(correction=0)
    expected = float((reference - outputs).square().mean() / variance)
    assert divergence([reference], [outputs]) == pytest.approx(expected)
    assert divergence([reference * 3 + 1], [outputs * 3 + 1]) == pytest.approx(expected)


def test_logits_are_compared_by_their_softmax_as_well() -> None:
    torch.manual_seed(1)
    reference, outputs = torch.randn(2, 30, 4, dtype=torch.float64)
    relative = divergence([reference.flatten()], [outputs.flatten()])
    log = functional.log_softmax(outputs, 1)
    expected = functional.kl_div(log, reference.softmax(1), reduction="batchmean")
    assert divergence([reference], [outputs]) == pytest.approx(relative + float(expected))
    # Maps of logits count by the mean of their positions.
    maps = [one.T.reshape(1, 4, 5, 6) for one in (reference, outputs)]
    assert divergence(maps[:1], maps[1:]) == pytest.approx(relative + float(expected))


def test_outputs_add_up_without_those_of_integers() -> None:
    torch.manual_seed(2)
    reference, outputs = torch.randn(2, 30, 4)
    one = divergence([reference], [outputs])
    assert divergence([reference, reference], [outputs, outputs]) == pytest.approx(2 * one)
    counts = torch.tensor([[1, 2]])
    assert divergence([reference, counts], [outputs, counts + 1]) == pytest.approx(one)


def test_equal_and_constant_outputs() -> None:
    for shape in ((3,), (3, 1), (3, 4)):
        assert divergence([torch.ones(shape)], [torch.ones(shape)]) == 0.0
        assert math.isfinite(divergence([torch.ones(shape)], [torch.zeros(shape)]))


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0])
def test_a_power_of_the_layers_error_is_found_again(power: float) -> None:
    errors = torch.linspace(0.01, 2.0, 100, dtype=torch.float64) ** 2
    distances = 0.3 * errors**power
    measured = [(count, float(distances[count - 1])) for count in (40, 60, 90)]
    found = costs_of(errors, measured).cumsum(0)
    # Beyond the first measurement the same power goes on; before it the distance is linear.
    torch.testing.assert_close(found[39:], distances[39:])
    torch.testing.assert_close(found[:40], distances[39] * errors[:40] / errors[39])


def test_costs_do_not_fall() -> None:
    torch.manual_seed(1)
    errors = torch.rand(50, dtype=torch.float64).cumsum(0)
    costs = costs_of(errors, [(10, 0.5), (20, 0.4), (40, 0.9)])
    assert bool((costs.diff() >= 0).all())
    assert bool((costs >= 0).all())


def test_layers_without_error_cost_next_to_nothing() -> None:
    costs = costs_of(torch.zeros(10, dtype=torch.float64), [(4, 0.0), (8, 0.0)])
    assert bool(torch.isfinite(costs).all())
    assert float(costs.sum()) < 1e-20


def test_one_measurement_is_enough() -> None:
    errors = torch.arange(1.0, 11.0, dtype=torch.float64)
    torch.testing.assert_close(costs_of(errors, [(5, 1.0)]).cumsum(0), errors / 5)
