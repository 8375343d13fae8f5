"""Ternary weights by ratio: two small integers times a whole number of each output."""

import math

import pytest
import torch
from fixed_networks import (
    Small,
    codes_like,
    fixed,
    images,
    network,
    nodes_of,
    ternary_network,
    various,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shohin
from shohin.errors import SpecError
from shohin.ir.encodings import Dense, same_bits
from shohin.ir.fixed_ops import fixed_conv2d, fixed_linear
from shohin.ir.fixed_point import FixedPoint
from shohin.ir.program import tensor_of
from shohin.ir.ternary import Ternary
from shohin.ir.verifier import verify
from shohin.passes.fixed.ratios import LARGEST, Ratio, nearest_pair
from shohin.passes.patterns import argument

TEXT = "fixed-point{ternary=ratio}"


def ternary(pair, rows=None, shape=(6, 40)):
    factors = None if rows is None else torch.tensor(rows)
    return Ternary(codes_like(torch.zeros(shape)), Dense(torch.tensor(pair)), factors)


@given(st.floats(0.2, 5))
def test_no_ratio_changes_by_more_than_half_of_the_widest_gap(ratio):
    positive, negative = nearest_pair(ratio)
    assert 1 <= positive <= LARGEST
    assert 1 <= negative <= LARGEST
    assert math.gcd(positive, negative) == 1
    # The widest gap is that from 7 : 2 to 4.
    assert abs(math.log(ratio * negative / positive)) <= math.log(8 / 7) / 2 + 1e-9


@pytest.mark.parametrize(
    ("ratio", "pair"),
    [(1.0, (1, 1)), (1.375, (7, 5)), (0.2, (1, 5)), (99.0, (10, 1)), (0.7, (7, 10))],
)
def test_the_nearest_pair(ratio, pair):
    assert nearest_pair(ratio) == pair


def test_factors_have_the_least_squared_error():
    stored = ternary([0.33, 0.19], rows=[0.5, -1.5, 2.0, 0.1, 1.0, 1.0])
    found = Ratio.of(stored)
    assert (found.positive, found.negative) == (7, 4)
    unit = Ternary.of(stored.codes, 7.0, 4.0, torch.float32).materialise().double().flatten(1)
    rows = stored.materialise().double().flatten(1)
    # All rows have one factor but for their own multipliers: that of all codes together.
    together = (rows / stored.rows.double().reshape(-1, 1) * unit).sum() / unit.square().sum()
    one = Ratio.of(Ternary(stored.codes, stored.scales))
    assert float(one.factors[0]) == pytest.approx(float(together))
    each = (rows * unit).sum(1) / unit.square().sum(1)
    assert found.factors.tolist() == pytest.approx(each.tolist())


@pytest.mark.parametrize(
    "stored",
    [
        Ternary(codes_like(torch.zeros(3, 4)), Dense(torch.rand(3, 2))),
        ternary([0.3, 0.0]),
        ternary([-0.3, 0.2]),
        ternary([0.3, float("inf")]),
    ],
)
def test_what_has_no_ratio(stored):
    assert Ratio.of(stored) is None


def test_rounded_values_are_multiples():
    found = Ratio.of(ternary([0.33, 0.19], rows=[0.5, -1.5, 2.0, 0.1, 1.0, 1e-9]))
    after = found.rounded(12, [9])
    assert torch.equal(after.codes, found.codes)
    assert isinstance(after.scales, FixedPoint)
    assert after.scales.bits == 12
    integers = after.scales.codes.long()
    factors = integers[:, 0] // 7
    assert torch.equal(integers, factors[:, None] * torch.tensor([7, 4]))
    assert factors.tolist() == [round(float(one) * 2**9) for one in found.factors]
    assert factors[5] == 0
    # Those that are too large are as large as they can be.
    assert int(found.rounded(6, [9]).scales.codes.abs().max()) == 28


@pytest.mark.parametrize(
    ("depth", "data", "bits"),
    [(40, 8, 12), (4000, 8, 12), (2**15, 8, 9), (2**20, 8, 8), (40, 16, 10)],
)
def test_sums_fit(depth, data, bits):
    codes = torch.ones(1, depth, dtype=torch.int8)
    found = Ratio.of(Ternary.of(codes, 0.3, 0.2, torch.float32))
    assert found.bits(8, data) == bits
    if bits > 8:
        assert depth * 2 ** (bits - 1) * 2 ** (data - 1) < 2**31


@pytest.mark.parametrize(
    "text", ["", " by_channel=true", " weights=5 data=12", " correct_bias=true"]
)
def test_a_network(text):
    program = ternary_network(pairs=lambda count: torch.tensor([0.33, 0.19]), rows=various)
    after = fixed(program, f"fixed-point{{ternary=ratio{text}}}").program
    verify(after)
    for name in ("conv.weight", "head.weight"):
        held = after.encodings[name]
        assert torch.equal(held.codes, program.encodings[name].codes)
        assert held.scales.bits == (9 if "weights" in text else 12)
        integers = held.scales.codes.long()
        assert torch.equal(integers * torch.tensor([4, 7]), integers.flip(1) * torch.tensor([7, 4]))
        assert same_bits(held.materialise(), tensor_of(after.module, name).detach())


def test_it_is_as_close_as_values_are():
    program, x = ternary_network(rows=various), images(64, seed=9)
    with torch.no_grad():
        wanted = program.module(x)
        errors = [
            float((fixed(program, text).program.module(x) - wanted).abs().mean())
            for text in (TEXT, "fixed-point{correct_bias=true}", "fixed-point{weights=4}")
        ]
    assert errors[0] < 1.5 * errors[1]
    assert errors[0] < 0.5 * errors[2]


def test_a_note_says_which():
    result = fixed(ternary_network(), TEXT)
    (first, second) = (one for one in result.report.notes() if one.reason == "ratio")
    assert first.detail == "conv.weight: values whose ratio is 1.5 are 3 : 2, times factors"
    assert second.extra == {"positive": 3, "negative": 2}
    assert not [one for one in fixed(ternary_network()).report.notes() if one.reason == "ratio"]


def test_layers_without_a_bias_keep_their_values():
    class Bare(Small):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 5, bias=False)

    after = fixed(ternary_network(module=Bare), TEXT).program
    assert after.encodings["conv.weight"].scales.bits == 12
    assert after.encodings["head.weight"].scales.bits == 8


def test_other_weights_are_as_ever():
    one, two = (fixed(network(Small), text).program for text in (TEXT, "fixed-point"))
    for node in (*nodes_of(two, fixed_conv2d), *nodes_of(two, fixed_linear)):
        name = str(argument(node, "weight").target)
        assert same_bits(one.encodings[name].materialise(), two.encodings[name].materialise())


def test_widths_are_found_as_those_that_were_asked_for():
    program, x = ternary_network(), images(32, seed=4)
    with torch.no_grad():
        wanted = program.module(x)

    def evaluate(module):
        with torch.no_grad():
            return -float((module(x) - wanted).abs().mean() / wanted.abs().mean())

    text = "fixed-point{ternary=ratio bits=auto max_drop=0.2}"
    result = fixed(program, text, evaluate=evaluate)
    widths = {one.detail for one in result.report.notes() if one.reason == "width"}
    for name in ("conv.weight", "head.weight"):
        (bits,) = (int(one.split(": ")[1].split()[0]) for one in widths if one.startswith(name))
        assert result.program.encodings[name].scales.bits == bits + 4


def test_one_radix_for_all_is_refused():
    with pytest.raises(SpecError) as caught:
        shohin.optimize(network(), "fixed-point{ternary=ratio strategy=static}")
    assert "fixed-point ternary: 'ratio' does not go together with 'strategy=static'" in str(
        caught.value
    )
