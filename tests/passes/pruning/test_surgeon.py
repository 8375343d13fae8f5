"""Eliminations, taken together over the rows of a layer."""

import torch

from shohin.passes.pruning.surgeon import Problem, eliminate, reconstruct


def test_errors_are_those_of_the_rows_at_their_best() -> None:
    torch.manual_seed(0)
    inputs, weights = torch.randn(2, 30, 8, dtype=torch.float64), 8
    hessian = inputs.mT @ inputs
    start = torch.randn(6, 8, dtype=torch.float64)
    target = (start.view(2, 3, 8) @ hessian).flatten(0, 1)
    priority = torch.zeros(6, weights, dtype=torch.float64)
    pull = torch.zeros(2, 8, dtype=torch.float64)
    problem = Problem(hessian, pull, target, start, priority)
    elimination = eliminate(problem)
    errors = elimination.errors()
    assert errors.shape == (48,)
    assert bool((errors.diff() >= 0).all())
    for dropped in (1, 5, 20, 48):
        change = reconstruct(problem, elimination.mask(dropped)) - start
        change = change.view(2, 3, 8)
        found = (change @ hessian * change).sum()
        torch.testing.assert_close(errors[dropped - 1], found)
