from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shohin.errors import SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import Dense
from shohin.ir.program import Stage, tensor_of
from shohin.passes.fold_constants import FoldConstants


class Constant(nn.Module):
    """Multiplies its input by what a function makes of a parameter of `[4]`."""

    def __init__(self, function):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1.0, 1.0, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.scale)


def program_of(function):
    return capture(Constant(function), (torch.ones(2, 4),), name="scaled")


def operators(program):
    return [node.name for node in program.graph.nodes if node.op == "call_function"]


FOLDED = {
    "chain": lambda scale: scale.exp().mul(2).sqrt(),
    "several results": lambda scale: torch.cat(scale.split(2)[::-1]),
    "creation": lambda scale: torch.arange(4) + scale,
    "created alone": lambda scale: torch.full((4,), 0.5),
    "view": lambda scale: scale.view(2, 2).t().reshape(4),
}


def test_golden(apply, golden):
    program = program_of(FOLDED["chain"])
    golden("fold_constants", program, apply(FoldConstants(), program).program)


@pytest.mark.parametrize("function", FOLDED.values(), ids=FOLDED)
def test_constant_subgraphs_become_buffers(apply, function):
    program = program_of(function)
    after = apply(FoldConstants(), program)
    x = torch.randn(3, 4)
    assert len(operators(after.program)) == 1
    assert after.reasons() == {"folded"}
    assert all(name.startswith("folded_") for name, _ in after.program.module.named_buffers())
    with torch.no_grad():
        assert torch.equal(program.module(x), after.program.module(x))


def test_names_come_from_the_nodes(apply):
    program = program_of(lambda scale: scale.exp())
    program.module.register_buffer("folded_exp", torch.ones(1))
    after = apply(FoldConstants(), program).program
    assert torch.equal(tensor_of(after.module, "folded_exp_1"), torch.linspace(-1, 1, 4).exp())


def test_a_folded_view_does_not_share_memory(apply):
    after = apply(FoldConstants(), program_of(lambda scale: scale.view(1, 4))).program
    with torch.no_grad():
        tensor_of(after.module, "scale").zero_()
    assert bool(tensor_of(after.module, "folded_view").any())


def test_growth_beyond_the_limit_folds_what_is_below(apply):
    program = program_of(lambda scale: scale.exp().expand(500, 4).sum(0))
    grown = program_of(lambda scale: scale.exp().repeat(500, 1)[:1])
    assert operators(apply(FoldConstants(), program).program) == ["mul"]

    def broadcast(x: Tensor, scale: Tensor) -> Tensor:
        return x.unsqueeze(1) * scale.exp().expand(500, 4)

    module = Constant(lambda scale: scale)
    module.forward = lambda x: broadcast(x, module.scale)
    after = apply(FoldConstants(), capture(module, (torch.ones(2, 4),)))
    assert after.reason("expand") == "would-grow"
    assert after.reason("exp") == "folded"
    wide = apply(FoldConstants(max_growth=8000), capture(module, (torch.ones(2, 4),)))
    assert wide.reason("expand") == "folded"
    assert operators(apply(FoldConstants(), grown).program) == ["mul"]


def test_weights_that_become_superfluous_pay_for_growth(apply):
    tight = FoldConstants(max_growth=0)
    assert apply(tight, program_of(lambda scale: scale.exp())).modified
    assert apply(tight, program_of(lambda scale: scale.double())).reasons() == {"would-grow"}


def test_random_operators_are_not_folded(apply):
    assert not apply(FoldConstants(), program_of(lambda scale: torch.rand(4))).modified
    assert not apply(FoldConstants(), program_of(torch.bernoulli)).modified


def test_uninitialised_memory_is_not_folded(apply):
    assert not apply(FoldConstants(), program_of(torch.empty_like)).modified


def test_encoded_weights_are_not_folded(apply):
    program = program_of(lambda scale: scale.exp())
    held = {"scale": Dense(tensor_of(program.module, "scale").detach())}
    encoded = replace(program, encodings=held, stage=Stage.ANNOTATED)
    after = apply(FoldConstants(), encoded)
    assert not after.modified
    assert after.reason("exp") == "already-encoded"


def test_what_depends_on_the_inputs_stays(apply):
    program = capture(nn.Linear(4, 4), (torch.ones(2, 4),))
    assert not apply(FoldConstants(), program).modified


def test_sites_that_are_not_allowed_stay(apply):
    program = program_of(lambda scale: scale.exp())
    after = apply(FoldConstants(), program, allows=lambda site: False)
    assert after.reason("exp") == "excluded-by-option"


def test_option_errors():
    with pytest.raises(SpecError) as caught:
        FoldConstants(max_growth=-1).validate()
    assert str(caught.value) == "fold-constants max_growth: expected 0 or more bytes, got -1"


def test_twice_is_once(apply):
    once = apply(FoldConstants(), program_of(FOLDED["chain"])).program
    assert not apply(FoldConstants(), once).modified


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_random_networks_stay_bit_equal(apply, random_network, seed):
    program = capture(random_network(seed), (torch.ones(2, 4, 6, 6),))
    after = apply(FoldConstants(), program).program
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(program.module(x), after.module(x))
