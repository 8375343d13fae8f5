from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ternary_networks import rows_of

from shohin.passes.pruning.surgeon import Problem
from shohin.passes.ternarising.fitting import (
    SHARES,
    Plain,
    best_threshold,
    fit_scales,
    fit_ternary,
)


def problem(rows=4, inputs=5, groups=1, seed=0, correlated=1.0, common=1):
    """A layer of random weights whose inputs have much in common, in some directions."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = draw(groups, inputs, common) @ draw(groups, common, 200)
    x = draw(groups, inputs, 200) + correlated * shared
    hessian = x @ x.mT + 0.1 * torch.eye(inputs, dtype=torch.float64)
    start = draw(rows, inputs)
    target = (start.view(groups, -1, inputs) @ hessian).flatten(0, 1)
    nothing = torch.zeros(groups, inputs, dtype=torch.float64)
    return Problem(hessian, nothing, target, start, torch.zeros(rows, inputs).double())


def error(found, rows):
    """What rows respond wrongly, row by row."""
    lack = rows - found.start
    hessian = found.hessian[found.groups]
    return torch.einsum("ri,rij,rj->r", lack, hessian, lack)


def gains(found, codes, pairs):
    return error(found, torch.zeros_like(found.start)) - error(found, rows_of(codes, pairs))


def random_codes(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(torch.int8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([1, 2, 4]), st.sampled_from(["row", "layer"]))
def test_no_other_scales_have_less_error(seed, groups, scales):
    """For any codes, bad ones included, for which the best of a scale may be 0."""
    found = problem(4, 3, groups, seed)
    codes = random_codes((4, 3), seed)
    fit = fit_scales(found, codes, scales)
    assert torch.equal(fit.codes, codes)
    assert bool((fit.pairs >= 0).all())
    assert torch.allclose(fit.gain, gains(found, codes, fit.pairs), rtol=1e-9, atol=1e-9)
    grid = torch.linspace(0, 4, 81, dtype=torch.float64)
    if scales == "row":
        assert torch.equal(fit.pairs[:, 0], fit.pairs[:, 1])
        for value in grid:
            other = gains(found, codes, value.expand(4, 2))
            assert bool((other <= fit.gain + 1e-9).all())
    else:
        assert bool((fit.pairs == fit.pairs[0]).all())
        near = [fit.pairs[0] + torch.tensor(d) * 1e-3 for d in product((-1, 0, 1), repeat=2)]
        far = [torch.stack(pair) for pair in product(grid[::4], repeat=2)]
        for pair in (*near, *far):
            other = gains(found, codes, pair.clamp_min(0).expand(4, 2)).sum()
            assert float(other) <= float(fit.gain.sum()) + 1e-9


def test_a_scale_that_would_be_negative_is_zero_and_the_other_at_its_best():
    """Inputs that are alike: what -1 takes is better given to what 1 takes."""
    hessian = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    start = torch.tensor([[2.0, 1.0]], dtype=torch.float64)
    nothing = torch.zeros(1, 2, dtype=torch.float64)
    found = Problem(hessian, nothing, start @ hessian[0], start, nothing)
    fit = fit_scales(found, torch.tensor([[1, -1]], dtype=torch.int8), "layer")
    assert fit.pairs.tolist() == [[2.0, 0.0]]
    assert fit.gain.tolist() == [4.0]


@pytest.mark.parametrize("scales", ["row", "layer"])
def test_the_threshold_is_the_best_of_those_that_are_tried(scales):
    found = problem(6, 8, 2)
    fit = best_threshold(found, scales)
    sizes = found.start.abs()
    mean = sizes.mean(1, keepdim=True) if scales == "row" else sizes.mean()
    tried = []
    for share in SHARES:
        codes = (found.start.sign() * (sizes > share * mean)).to(torch.int8)
        tried.append(fit_scales(found, codes, scales).gain)
    gain = torch.stack(tried)
    if scales == "row":
        assert torch.equal(fit.gain, gain.max(0).values)
    else:
        assert float(fit.gain.sum()) == float(gain.sum(1).max())
    assert torch.allclose(fit.gain, gains(found, fit.codes, fit.pairs), rtol=1e-9)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 999))
def test_near_to_the_best_of_all_codes(seed):
    """Brute force over all 3**5 codes of a row: most of what can be gained is."""
    found = problem(4, 5, 2, seed)
    every = torch.tensor(list(product((-1, 0, 1), repeat=5)), dtype=torch.int8)
    best = (
        torch.stack([fit_scales(found, one.expand(4, 5), "row").gain for one in every])
        .max(0)
        .values
    )
    fit = fit_ternary(found, "row", compensate=True)
    assert bool((fit.gain <= best + 1e-9).all())
    assert float(fit.gain.sum()) >= 0.8 * float(best.sum())


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from(["row", "layer"]), st.sampled_from([1, 2]))
def test_compensation_is_never_worse(seed, scales, groups):
    found = problem(4, 12, groups, seed, correlated=3.0)
    before = found.start.clone()
    plain = fit_ternary(found, scales, compensate=False)
    better = fit_ternary(found, scales, compensate=True)
    if scales == "row":
        assert bool((better.gain >= plain.gain).all())
    assert float(better.gain.sum()) >= float(plain.gain.sum())
    assert torch.allclose(better.gain, gains(found, better.codes, better.pairs), rtol=1e-8)
    # Problems are used again.
    assert torch.equal(found.start, before)


def test_compensation_takes_most_of_the_error_of_inputs_that_have_much_in_common():
    lost = {}
    for compensate in (False, True):
        total, reached = 0.0, 0.0
        for seed in range(5):
            found = problem(8, 32, 1, seed, correlated=5.0, common=8)
            total += float(fit_ternary(found, "row", compensate=compensate).gain.sum())
            reached += float((found.target * found.start).sum())
        lost[compensate] = 1 - total / reached
    assert lost[True] < 0.5 * lost[False]


@pytest.mark.parametrize("scales", ["row", "layer"])
@pytest.mark.parametrize("compensate", [False, True])
def test_rows_of_zeros(scales, compensate):
    found = problem(4, 6)
    found.start[1], found.target[1] = 0.0, 0.0
    fit = fit_ternary(found, scales, compensate=compensate)
    assert not fit.codes[1].any()
    assert float(fit.gain[1]) == 0.0
    assert bool(torch.isfinite(fit.pairs).all() and torch.isfinite(fit.gain).all())
    nothing = replace(found, start=found.start * 0, target=found.target * 0)
    empty = fit_ternary(nothing, scales, compensate=compensate)
    assert not empty.codes.any()
    assert not empty.gain.any()


@pytest.mark.parametrize("scales", ["row", "layer"])
def test_weights_alone_are_a_problem_whose_inputs_have_nothing_in_common(scales):
    found = problem(6, 8)
    same = replace(found, hessian=torch.eye(8, dtype=torch.float64).unsqueeze(0))
    same = replace(same, target=found.start)
    one, two = (best_threshold(each, scales) for each in (same, Plain(found.start)))
    assert torch.equal(one.codes, two.codes)
    assert torch.allclose(one.pairs, two.pairs)
    assert torch.allclose(one.gain, two.gain)
