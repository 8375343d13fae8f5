import pytest
import torch

from shohin.passes.factoring.regression import Regression
from shohin.passes.factoring.solvers import Schedule, relative_error, relaxed, solve

SCHEDULE = Schedule((0.1, 1.0), (30, 20))


def responses(outputs=8, samples=2000, rank=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(rank, samples, generator=generator)
    y = torch.randn(outputs, rank, generator=generator) @ core
    return y + 0.3 * torch.randn(outputs, samples, generator=generator)


def solved(y, rank, schedule, features=None):
    x = y.clone() if features is None else features.clone()
    regression = Regression(x, torch.eye(len(y), dtype=torch.float64))
    return regression, solve(regression, y, rank, schedule)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_without_a_schedule_it_is_the_principal_components(rank):
    y = responses()
    regression, found = solved(y, rank, None)
    centred = (y - y.mean(1, keepdim=True)).double()
    lost = torch.linalg.svdvals(centred)[rank:].square().sum()
    expected = float(lost / y.double().square().sum())
    assert relative_error(regression, found, y, rectified=False) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_alternating_solver_loses_less_after_the_relu(seed):
    y = responses(seed=seed)
    regression, linear = solved(y, 2, None)
    _, found = solved(y, 2, SCHEDULE)
    before = relative_error(regression, linear, y, rectified=True)
    after = relative_error(regression, found, y, rectified=True)
    assert after < 0.95 * before


def test_no_iterations_are_the_linear_solution():
    y = responses()
    _, found = solved(y, 2, Schedule((1.0,), (0,)))
    _, linear = solved(y, 2, None)
    assert torch.equal(found.inner, linear.inner)


def test_what_the_relu_hides_may_be_anything():
    """Responses of rank one where they are positive are reproduced, whatever they are elsewhere."""
    generator = torch.Generator().manual_seed(0)
    core = torch.rand(1, 3000, generator=generator)
    y = torch.tensor([[1.0], [2.0], [0.5]]) @ core
    y[2] = -y[2] - torch.rand(3000, generator=generator)
    regression, found = solved(y, 1, SCHEDULE)
    _, linear = solved(y, 1, None)
    assert relative_error(regression, found, y, rectified=True) < 1e-3
    assert relative_error(regression, linear, y, rectified=True) > 1e-3


def test_inputs_that_are_off_are_made_up_for():
    """The asymmetric form: features are not the wanted responses but what is left of them."""
    y = responses(rank=8)
    generator = torch.Generator().manual_seed(5)
    mixed = (torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator)) @ y + 1
    regression, found = solved(y, None, SCHEDULE, mixed)
    assert relative_error(regression, found, y, rectified=True) < 1e-6


@pytest.mark.parametrize("penalty", [0.01, 0.1, 1.0, 5.0])
def test_relaxed_responses_are_the_best_there_are(penalty):
    generator = torch.Generator().manual_seed(0)
    given = 2 * torch.randn(200, generator=generator)
    target = torch.randn(200, generator=generator).clamp_min(0)
    found = relaxed(target, given, penalty)

    def cost(z):
        return (target - z.clamp_min(0)).square() + penalty * (z - given).square()

    grid = torch.linspace(-8, 8, 16001).unsqueeze(1)
    # A grid of step 0.001 misses the best by no more than its curvature times a quarter step^2.
    assert (cost(found) <= cost(grid).min(0).values + 1e-6).all()


def test_the_error_of_nothing_is_zero():
    y = torch.zeros(3, 50)
    regression, found = solved(y, None, None)
    assert relative_error(regression, found, y, rectified=True) == 0.0
