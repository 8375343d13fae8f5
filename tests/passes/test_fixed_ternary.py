"""Ternary weights in fixed point: two integers, or two of each row, and the codes as they were."""

from dataclasses import replace

import pytest
import torch
from fixed_networks import fixed, images, ternary_network, various
from torch import nn
from torch.nn import functional

import shohin
from shohin.ir.encodings import same_bits
from shohin.ir.fixed_ops import fixed_conv2d, fixed_linear
from shohin.ir.fixed_point import FixedPoint
from shohin.ir.program import tensor_of
from shohin.ir.serialise import load_program, save_program
from shohin.ir.ternary import Ternary
from shohin.ir.verifier import verify
from shohin.passes.fixed.stored import can_encode, encoded, is_trainable
from shohin.passes.patterns import argument
from shohin.passes.remarks import Reason


def check(before, after, bits=8):
    """Codes are those of before, values are nearest on the grid, and the module has them."""
    verify(after)
    for node in after.graph.nodes:
        if node.target not in (fixed_conv2d, fixed_linear):
            continue
        name = str(argument(node, "weight").target)
        fractions = argument(node, "weight_fractions")
        stored, held = before.encodings[name], after.encodings[name]
        assert isinstance(held, Ternary)
        assert isinstance(held.scales, FixedPoint)
        assert held.rows is None
        assert held.scales.bits == bits
        assert held.scales.fractions == tuple(fractions)
        assert torch.equal(held.codes, stored.codes)
        steps = 2.0 ** -torch.tensor(fractions, dtype=torch.float32).reshape(-1, 1)
        found = held.pairs().expand(max(len(held.pairs()), len(stored.pairs())), 2)
        inside = found.abs() < steps * (2 ** (bits - 1) - 1)
        assert bool(inside.any())
        error = (found - stored.pairs()).abs()
        assert bool((error <= steps / 2)[inside].all())
        assert same_bits(held.materialise(), tensor_of(after.module, name).detach())


CASES = {
    "one pair": {},
    "a pair a row": {"pairs": lambda count: torch.rand(count, 2) + 0.1},
    "rows": {"rows": various},
    "a pair a row, and rows": {"pairs": lambda count: torch.rand(count, 2) + 0.1, "rows": various},
}


@pytest.mark.parametrize("text", ["", "by_channel=true", "strategy=static", "weights=5"])
@pytest.mark.parametrize("name", CASES)
def test_codes_stay_and_values_are_on_the_grid(name, text, tmp_path):
    torch.manual_seed(5)
    program = ternary_network(**CASES[name])
    result = fixed(program, f"fixed-point{{{text}}}" if text else "fixed-point")
    check(program, result.program, 5 if "weights" in text else 8)
    several = name != "one pair" or "by_channel" in text
    scales = result.program.encodings["conv.weight"].scales
    assert scales.shape == ((8, 2) if several else (2,))
    save_program(result.program, tmp_path / "net.shohin")
    loaded = load_program(tmp_path / "net.shohin")
    x = images(3)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), result.program.module(x))
    check(program, loaded, 5 if "weights" in text else 8)


def test_the_layer_is_described():
    result = fixed(ternary_network(rows=various))
    details = [one.detail for one in result.report.remarks if one.reason == "fixed-point"]
    assert any("ternary" in one and "of 8-bit fixed point" in one for one in details)


def test_the_network_stays_close():
    program, x = ternary_network(), images(8, seed=9)
    after = fixed(program, "fixed-point{weights=8 data=12}").program
    with torch.no_grad():
        wanted, found = program.module(x), after.module(x)
    assert float((wanted - found).abs().max()) < 0.02 * float(wanted.abs().max())


def test_values_that_become_zero_are_told():
    def rows(count):
        found = torch.ones(count)
        found[2] = 1e-5
        return found

    program = ternary_network(rows=rows)
    notes = [r for r in fixed(program).report.notes() if r.reason == "rounded-to-zero"]
    assert [one.extra["values"] for one in notes] == [2, 2]
    result = fixed(program, "fixed-point{by_channel=true}")
    assert not [r for r in result.report.notes() if r.reason == "rounded-to-zero"]
    check(program, fixed(program).program)


def test_training_moves_biases_alone():
    program, x = ternary_network(rows=various), images(64)
    with torch.no_grad():
        y = program.module(x).argmax(1)
    train = shohin.Trainer([(x, y)], epochs=5, learning_rate=0.05)
    result = fixed(program, "fixed-point{retrain=all}", [(x,)], train=train)
    check(program, result.program)
    notes = [one.detail for one in result.report.notes() if one.reason == "not-trained"]
    assert len(notes) == 2
    assert all("ternary" in one for one in notes)
    plain = fixed(program, "fixed-point", [(x,)]).program
    losses = []
    with torch.no_grad():
        losses = [float(functional.cross_entropy(p.module(x), y)) for p in (plain, result.program)]
    assert losses[1] < losses[0]


def test_biases_are_corrected():
    program = ternary_network()
    result = fixed(program, "fixed-point{correct_bias=true weights=4}")
    check(program, result.program, 4)


def test_ranges_of_ternary_weights_stay():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    program = ternary_network(rows=various, module=Two)
    result = fixed(program, "fixed-point{equalise=true}")
    check(program, result.program)
    notes = [one.detail for one in result.report.notes() if one.reason == "not-equalised"]
    assert [one.split()[0] for one in notes] == ["one.weight", "two.weight"]


def test_widths_are_chosen():
    program, x = ternary_network(), images(16)
    with torch.no_grad():
        wanted = program.module(x)

    def evaluate(module):
        with torch.no_grad():
            return -float((module(x) - wanted).abs().mean() / wanted.abs().mean())

    text = "fixed-point{bits=auto max_drop=0.5 data=12}"
    result = fixed(program, text, evaluate=evaluate)
    widths = {name: one.scales.bits for name, one in result.program.encodings.items()}
    assert min(widths.values()) < 8
    assert evaluate(result.program.module) >= -0.5
    assert all(
        same_bits(one.materialise(), tensor_of(result.program.module, name).detach())
        for name, one in result.program.encodings.items()
    )


def test_fixed_values_are_left_alone():
    program = ternary_network()
    held = encoded(program.encodings["head.weight"], torch.zeros(5, 8), 8, [7])
    assert not can_encode(held)
    assert not is_trainable(held)
    with torch.no_grad():
        tensor_of(program.module, "head.weight").copy_(held.materialise())
    program = replace(program, encodings={**program.encodings, "head.weight": held})
    result = fixed(program)
    skipped = [one for one in result.report.remarks if one.reason == Reason.ALREADY_ENCODED]
    assert any("head.weight" in one.detail for one in skipped)
    assert result.program.encodings["head.weight"] is held


def test_excluded_weights_keep_their_encoding():
    program = ternary_network()
    result = fixed(program, "fixed-point{exclude=[conv.weight]}").program
    assert result.encodings["conv.weight"] is program.encodings["conv.weight"]
    assert isinstance(result.encodings["head.weight"].scales, FixedPoint)
