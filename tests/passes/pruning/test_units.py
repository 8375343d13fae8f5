import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shohin.ir.capture import capture
from shohin.passes.pruning.candidates import find_candidates
from shohin.passes.pruning.pools import Pool, masks_of
from shohin.passes.pruning.units import Units, parse_block, units_of


def candidate_of(layer, shape):
    (found,) = find_candidates(capture(layer, (torch.ones(shape),)))
    return found


def linear(inputs, outputs):
    return candidate_of(nn.Linear(inputs, outputs), (2, inputs))


def mask_of(units, density, held=None):
    name = units.candidate.name
    values = {name: units.candidate.weight.detach()}
    return masks_of(Pool((units,), density), values, held or {}, density, 1.0)[name]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    block=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    density=st.floats(0.0, 1.0),
    seed=st.integers(0, 100),
)
def test_blocks_live_or_die_by_their_means(rows, columns, block, density, seed):
    torch.manual_seed(seed)
    candidate = linear(columns, rows)
    with torch.no_grad():
        candidate.weight.copy_(torch.randint(-3, 4, (rows, columns)))
    units = Units(candidate, *block)
    mask = mask_of(units, density)
    means, alive = [], []
    for top in range(0, rows, block[0]):
        for left in range(0, columns, block[1]):
            area = slice(top, top + block[0]), slice(left, left + block[1])
            assert mask[area].all() or not mask[area].any()
            means.append(candidate.weight.detach()[area].abs().mean().double())
            alive.append(bool(mask[area].any()))
    assert units.count == len(means)
    count = max(1, round(density * len(means)))
    assert sum(alive) == count
    lost = [mean for mean, lives in zip(means, alive, strict=True) if not lives]
    held = [mean for mean, lives in zip(means, alive, strict=True) if lives]
    # Means of as much may differ by their rounding.
    assert min(held) >= max(lost, default=0.0) - 1e-6
    weight = candidate.weight.detach()
    scores = torch.cat(list(units.scores(weight, None).pieces()))
    assert int(mask.sum()) == units.elements_of_most(scores, None)[count - 1]
    assert int(mask.sum()) <= units.elements_of_most(None, None)[count - 1]


@pytest.mark.parametrize(
    ("layer", "axis"), [(nn.Conv2d(3, 6, 2), 0), (nn.ConvTranspose2d(3, 6, 2), 1)]
)
def test_channels_are_output_channels(layer, axis):
    candidate = candidate_of(layer, (2, 3, 8, 8))
    units = units_of(candidate, "channel", "16x1")
    assert units.count == 6
    mask = mask_of(units, 0.5)
    per_channel = mask.transpose(0, axis).reshape(6, -1)
    sums = candidate.weight.detach().abs().transpose(0, axis).reshape(6, -1).sum(1)
    wanted = torch.zeros(6, dtype=torch.bool)
    wanted[sums.topk(3).indices] = True
    assert torch.equal(per_channel.all(1), wanted)
    assert torch.equal(per_channel.any(1), wanted)


def test_a_convolution_is_the_matrix_of_its_outputs():
    candidate = candidate_of(nn.Conv2d(3, 32, 3), (2, 3, 8, 8))
    units = units_of(candidate, "block", "16x1")
    assert units.count == 2 * 27
    mask = mask_of(units, 0.25).view(2, 16, 27)
    assert torch.equal(mask.all(1), mask.any(1))
    assert int(mask.any(1).sum()) == round(0.25 * 54)


def test_dead_units_are_not_chosen_for_ties():
    candidate = linear(4, 4)
    with torch.no_grad():
        candidate.weight.zero_()
        candidate.weight[3, 3] = 1.0
    held = {"weight": torch.zeros(4, 4, dtype=torch.bool)}
    held["weight"][2:, 2:] = True
    mask = mask_of(Units(candidate, 2, 2), 0.5, held)
    assert torch.equal(mask, held["weight"])
    mask = mask_of(Units(candidate), 2 / 16, held)
    assert mask.nonzero().tolist() == [[2, 2], [3, 3]]


def test_means_are_over_the_elements_that_a_unit_has():
    candidate = linear(3, 5)
    with torch.no_grad():
        candidate.weight.fill_(-2.0)
    units = Units(candidate, 2, 2)
    means = torch.cat(list(units.scores(candidate.weight.detach(), None).pieces()))
    assert means.tolist() == [2.0] * (math.ceil(5 / 2) * math.ceil(3 / 2))


def test_blocks_that_the_edge_cuts_off_lose_no_more_than_others():
    torch.manual_seed(0)
    candidate = linear(256, 1000)
    mask = mask_of(units_of(candidate, "block", "16x1"), 0.2)
    # 1000 is 62 times 16 and 8: means of 8 spread more widely than those of 16.
    last = float(mask[992:].double().mean())
    assert float(mask[:992].double().mean()) == pytest.approx(0.2, abs=0.01)
    assert 0.15 < last < 0.45


def test_the_most_elements_of_some_units():
    units = Units(linear(5, 7), 3, 2)
    # Blocks of 3 x 2 four times, of 3 x 1 twice, of 1 x 2 twice, and of 1 x 1 once.
    assert units.elements_of_most(None, None).tolist() == [6, 12, 18, 24, 27, 30, 32, 34, 35]
    held = torch.zeros(7, 5, dtype=torch.bool)
    held[2:4, 3:] = True
    # Four units have one element left each.
    assert units.elements_of_most(None, held).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("text", "found"),
    [("16x1", (16, 1)), ("1x8", (1, 8)), ("0x4", None), ("16", None), ("4x-1", None), ("x", None)],
)
def test_block_texts(text, found):
    assert parse_block(text) == found
