"""Shared weights that make up for each other's errors."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.program import tensor_of
from shohin.passes.pruning.surgeon import Problem
from shohin.passes.sharing.compensation import (
    assign,
    fit_centroids,
    with_bias,
    without_bias,
)


def problem_of(inputs, weights, *, biased=False, groups=1, pull=1e-9):
    """The problem whose least error is at given weights `[rows, inputs]`, for data of a layer.

    Args:
        inputs: float64 `[groups, positions, inputs]`.
        weights: `[rows, inputs]`; one more column with a bias.
        biased: whether every position has a one behind its inputs.
        groups: of rows.
        pull: added to the diagonal.
    """
    if biased:
        inputs = functional.pad(inputs, (0, 1), value=1.0)
    hessian = inputs.mT @ inputs
    diagonal = torch.full(hessian.shape[:2], pull, dtype=torch.float64)
    hessian = hessian + torch.diag_embed(diagonal)
    by_group = weights.view(groups, -1, weights.shape[1])
    target = (by_group @ hessian).flatten(0, 1)
    count = weights.shape[1] - biased
    return Problem(hessian, diagonal, target, weights.clone(), torch.zeros(len(weights), count))


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mixed(positions, inputs, seed=0):
    """Inputs that depend on each other."""
    return (normal(positions, 3, seed=seed) @ normal(3, inputs, seed=seed + 1))[
        None
    ] + 0.3 * normal(1, positions, inputs, seed=seed + 2)


CENTROIDS = torch.tensor([-1.5, -0.5, 0.25, 1.0], dtype=torch.float64)


def nearest(values):
    return (values.unsqueeze(-1) - CENTROIDS).abs().argmin(-1)


def response_error(problem, rows):
    lack = rows - problem.start
    hessian = problem.hessian[problem.groups]
    return float(torch.einsum("ri,rij,rj->", lack, hessian, lack))


def test_independent_inputs_have_nothing_to_make_up_for():
    weights = normal(6, 5)
    inputs = torch.eye(5, dtype=torch.float64)[None] * torch.arange(1.0, 6.0).double()
    problem = problem_of(inputs, weights)
    assert torch.equal(assign(problem, None, CENTROIDS), nearest(weights))


def test_one_row_by_hand():
    # The second input is half of the first, which is the stronger one and rounded first: 0.7 to
    # 1.0. Of the second, 0.1 - 0.3 * 2 = -0.5 is what makes up for it; by itself it were 0.25.
    inputs = torch.tensor([[[1.0, 0.5], [0.0, 1e-3]]], dtype=torch.float64)
    problem = problem_of(inputs, torch.tensor([[0.7, 0.1]], dtype=torch.float64))
    assert CENTROIDS[assign(problem, None, CENTROIDS)].tolist() == [[1.0, -0.5]]
    assert CENTROIDS[nearest(problem.start)].tolist() == [[1.0, 0.25]]


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_that_keep_everything_are_as_dense_ones(groups):
    weights = normal(8, 12)
    inputs = torch.cat([mixed(60, 12, seed) for seed in range(groups)])
    problem = problem_of(inputs, weights, groups=groups)
    dense = assign(problem, None, CENTROIDS)
    sparse = assign(problem, torch.ones(8, 12, dtype=torch.bool), CENTROIDS)
    assert torch.equal(dense, sparse)


def test_elements_that_are_not_kept_stay_zero():
    problem = problem_of(mixed(60, 12), normal(8, 12))
    mask = normal(8, 12, seed=5) > 0
    mask[3] = False
    mask[4, 1:] = False
    found = assign(problem, mask, CENTROIDS)
    assert torch.equal(found >= 0, mask)


@pytest.mark.parametrize("density", [None, 0.4])
def test_errors_of_dependent_inputs_make_up_for_each_other(density):
    problem = problem_of(mixed(200, 40), normal(30, 40))
    mask = None if density is None else torch.rand(30, 40) < density
    found = assign(problem, mask, CENTROIDS)
    kept = torch.ones(30, 40) if mask is None else mask
    plain = torch.where(kept.bool(), CENTROIDS[nearest(problem.start)], 0.0)
    rows = torch.where(found >= 0, CENTROIDS[found], 0.0)
    assert response_error(problem, rows) < 0.5 * response_error(problem, plain)


def test_centroids_are_the_least_squares_solution():
    inputs, weights = mixed(50, 10), normal(7, 10)
    problem = problem_of(inputs, weights, pull=0.0)
    assigned = nearest(weights)
    assigned[2, 3] = assigned[0, 0] = -1
    members = functional.one_hot(assigned + 1, 5)[..., 1:].double()
    design = torch.einsum("pi,rik->rpk", inputs[0], members).reshape(-1, 4)
    wanted = (weights @ inputs[0].T).reshape(-1)
    expected = torch.linalg.lstsq(design, wanted.unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(fit_centroids(problem, assigned, CENTROIDS), expected)


def test_centroids_of_nothing_stay():
    problem = problem_of(mixed(50, 10), normal(7, 10))
    found = fit_centroids(problem, torch.zeros(7, 10, dtype=torch.int64), CENTROIDS)
    assert torch.equal(found[1:], CENTROIDS[1:])
    assert found[0] != CENTROIDS[0]


def test_biases_are_at_their_best():
    problem = problem_of(mixed(50, 10) + 1.0, normal(7, 11), biased=True)
    weights = without_bias(problem)
    rows = CENTROIDS[nearest(weights.start)]
    whole = with_bias(problem, rows)
    slope = torch.einsum("ri,rij->rj", whole, problem.hessian[problem.groups]) - problem.target
    torch.testing.assert_close(slope[:, -1], torch.zeros(7).double(), atol=1e-8, rtol=0)
    # The error of weights alone is what is left with the best biases.
    assert response_error(weights, rows) == pytest.approx(response_error(problem, whole))


def _program(density=1.0):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 6),
    )
    program = capture(network, (torch.ones(2, 3, 6, 6),), name="small")
    if density < 1:
        return shohin.optimize(program, f"prune{{density={density}}}", drift=False).program
    return program


def _batches():
    base = functional.interpolate(torch.randn(64, 3, 2, 2, generator=_seeded(1)), size=6)
    return [(part,) for part in base.split(16)]


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_responses_change_less(density):
    program = _program(density)
    batches = _batches()
    data = torch.cat([batch[0] for batch in batches])
    with torch.no_grad():
        wanted = program.module(data)
    errors = {}
    for option in ("false", "true"):
        text = f"share-weights{{bits=2 compensate={option}}}"
        result = shohin.optimize(program, text, calibration=batches, drift=False).program
        with torch.no_grad():
            errors[option] = float((result.module(data) - wanted).square().mean())
        for name, encoding in result.encodings.items():
            weight = tensor_of(result.module, name).detach()
            assert same_bits(encoding.materialise(), weight)
            values = encoding.values if isinstance(encoding, Sparse) else encoding
            assert values.centroids.numel() <= 4
            assert (np.diff(values.centroids.numpy()) > 0).all()
    assert errors["true"] < 0.3 * errors["false"]


def test_the_same_seed_gives_the_same_weights():
    text = "share-weights{bits=2 compensate=true}"
    found = [
        shohin.optimize(_program(), text, calibration=_batches(), seed=3, drift=False).program
        for _ in range(2)
    ]
    for name in found[0].encodings:
        first, second = (tensor_of(one.module, name) for one in found)
        assert same_bits(first.detach(), second.detach())


def test_without_batches():
    with pytest.raises(SpecError) as caught:
        shohin.optimize(_program(), "share-weights{compensate=true}")
    assert str(caught.value) == (
        "share-weights compensate: 'true' needs calibration batches, got none; "
        "give calibration=[(inputs,), ...], or --data on the command line"
    )


def test_layers_that_it_cannot_see_through():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Conv1d(4, 16, 3)), (torch.ones(2, 4, 9),), name="one")
    result = shohin.optimize(
        program, "share-weights{bits=2 compensate=true}", calibration=[(torch.ones(2, 4, 9),)]
    )
    assert set(result.program.encodings) == {"0.weight"}
    (note,) = result.report.notes()
    assert note.detail == (
        "0.weight is read by aten.conv1d.default, expected conv2d or linear; "
        "it is shared without compensation"
    )
