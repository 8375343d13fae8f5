from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from shohin.ir.capture import capture
from shohin.passes.make_functional import MakeFunctional

aten = torch.ops.aten
WRITERS = [aten.relu_.default, aten.sigmoid_.default, aten.neg_.default, aten.tanh_.default]


def written(targets, reads_before=True):
    """A program that writes to the result of a linear map and reads it before and after."""

    class Writer(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    torch.manual_seed(0)
    program = capture(Writer(), (torch.ones(2, 4),), name="writer")
    graph = program.graph
    (output,) = graph.find_nodes(op="output")
    linear = output.args[0]
    with graph.inserting_before(output):
        before = graph.call_function(aten.exp.default, (linear,))
        for target in targets:
            graph.call_function(target, (linear,))
        total = graph.call_function(aten.add.Tensor, (linear, before if reads_before else linear))
    output.args = (total,)
    program.module.recompile()
    return replace(program, facts=frozenset())


def test_golden(apply, golden):
    program = written([aten.relu_.default])
    golden("make_functional", program, apply(MakeFunctional(), program).program)


def test_a_functional_program_is_left_alone(apply):
    after = apply(MakeFunctional(), capture(nn.Linear(4, 4), (torch.ones(2, 4),)))
    assert not after.modified
    assert after.remarks == []


def test_twice_is_once(apply):
    once = apply(MakeFunctional(), written([aten.relu_.default])).program
    assert not apply(MakeFunctional(), once).modified


@settings(max_examples=8, deadline=None)
@given(targets=st.lists(st.sampled_from(WRITERS), min_size=1, max_size=4), reads=st.booleans())
def test_random_writes_give_the_same(apply, targets, reads):
    program = written(targets, reads)
    after = apply(MakeFunctional(), program)
    assert after.modified
    assert len(after.remarks) >= len(targets)
    assert not any(node.target in WRITERS for node in after.program.graph.nodes)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(program.module(x), after.program.module(x))
