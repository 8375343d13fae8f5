from dataclasses import replace

import torch

from shohin.ir.annotations import ActivationFormat, annotate
from shohin.ir.program import InputSpec, Program, set_tensor, tensor_of
from shohin.passes.instruments.verifying import find_difference


def test_a_copy_has_no_difference(program: Program) -> None:
    assert find_difference(program, program) is None
    assert find_difference(program, program.copy()) is None


def test_names_facts_and_history_do_not_count(program: Program) -> None:
    other = replace(program.copy(), name="other", history=("a",), facts=frozenset())
    assert find_difference(program, other) is None


def test_a_nan_equals_the_same_nan(program: Program) -> None:
    set_tensor(program.module, "0.bias", torch.full((2,), float("nan")))
    assert find_difference(program, program.copy()) is None


def test_the_sign_of_zero_is_a_difference(program: Program) -> None:
    other = program.copy()
    set_tensor(other.module, "0.bias", -torch.zeros(2))
    assert find_difference(program, other) == "tensor '0.bias' differs"


def test_an_edit_in_place_behind_autograd_is_a_difference(program: Program) -> None:
    other = program.copy()
    tensor_of(other.module, "0.weight").data.mul_(2)
    assert find_difference(program, other) == "tensor '0.weight' differs"


def test_an_annotation_is_a_difference(program: Program) -> None:
    other = program.copy()
    *_, linear, _ = other.graph.nodes
    annotate(linear, ActivationFormat(8, 3))
    assert find_difference(program, other) == "node 'linear' differs"


def test_an_unused_node_is_a_difference(program: Program) -> None:
    other = program.copy()
    with other.graph.inserting_after(next(iter(other.graph.nodes))):
        other.graph.call_function(torch.ops.aten.relu.default, (next(iter(other.graph.nodes)),))
    assert find_difference(program, other) == "node '_0_weight' differs"


def test_inputs_are_compared(program: Program) -> None:
    other = replace(program, inputs=(InputSpec("x", (1, 2), torch.float32),))
    assert find_difference(program, other) == "the inputs or the stage differ"
