import math
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx

from shohin.errors import VerifyError
from shohin.ir import (
    RULES,
    ActivationFormat,
    Dense,
    InputSpec,
    Program,
    Sparse,
    Stage,
    annotate,
    tensor_of,
    verify,
)
from shohin.ir.fixed_ops import fixed_quantize

aten = torch.ops.aten
BROKEN: dict[str, tuple[Callable[[Program], Program], str]] = {}


def breaks(rule: str, text: str) -> Callable[[Callable[[Program], Program]], None]:
    """Register a change that breaks a rule, with the text expected of the error."""

    def register(change: Callable[[Program], Program]) -> None:
        BROKEN[f"{rule}: {change.__name__}"] = (change, text)

    return register


def _find(program: Program, name: str) -> fx.Node:
    return next(node for node in program.graph.nodes if node.name == name)


def _sparse(program: Program, name: str) -> dict[str, Sparse]:
    weight = tensor_of(program.module, name)
    return {name: Sparse.from_dense(weight, torch.ones_like(weight, dtype=torch.bool))}


@breaks("well-formed", r"graph: \[well-formed\] expected a well-formed graph, found Argument")
def use_before_definition(program: Program) -> Program:
    _find(program, "linear").append(_find(program, "dropout"))
    return program


@breaks("known-kinds", r"node 'relu': \[known-kinds\] expected one of .*, found 'call_method'")
def method_call(program: Program) -> Program:
    _find(program, "relu").op = "call_method"
    _find(program, "relu").target = "relu"
    return program


@breaks("known-kinds", r"node 'relu': .* a torch operator or an arithmetic .* function 'relu'")
def python_function(program: Program) -> Program:
    _find(program, "relu").target = torch.nn.functional.relu
    return program


@breaks("functional", r"node 'relu': .* no operator in place, found aten\.relu_\.default")
def in_place(program: Program) -> Program:
    _find(program, "relu").target = aten.relu_.default
    return program


@breaks("attributes", r"node 'fc_weight': .* an attribute 'no\.weight' of the module, found none")
def missing_path(program: Program) -> Program:
    _find(program, "fc_weight").target = "no.weight"
    return program


@breaks("attributes", r"node 'fc_weight': .* an attribute 'fc\.lost' of the module, found none")
def missing_weight(program: Program) -> Program:
    _find(program, "fc_weight").target = "fc.lost"
    return program


@breaks("inputs", r"inputs: .* placeholders \['photo'\], found \['image'\]")
def renamed_input(program: Program) -> Program:
    return replace(program, inputs=(InputSpec("photo", ("N", 3, 8, 8), torch.float32),))


@breaks("output", r"output: .* a node or a flat tuple of nodes, found \(linear, 3\)")
def constant_output(program: Program) -> Program:
    _find(program, "output").args = ((_find(program, "linear"), 3),)
    return program


@breaks("output", r"output: .* one output node, found 0")
def no_output(program: Program) -> Program:
    program.graph.erase_node(_find(program, "output"))
    return program


@breaks("encoded-names", r"encoding of 'fc\.wait': .* a parameter or buffer of that name")
def unknown_weight(program: Program) -> Program:
    return replace(program, encodings={"fc.wait": Dense(torch.ones(1))})


@breaks("encoded-bits", r"expected float32\[2,4\] as in the module, found float64\[2,4\]")
def other_type(program: Program) -> Program:
    return replace(program, encodings={"fc.weight": Dense(torch.ones(2, 4, dtype=torch.float64))})


@breaks("encoded-bits", r"1 of 8 elements that differ, the first at 3: 0\.0 encoded, -0\.0 in the")
def negative_zero(program: Program) -> Program:
    weight = tensor_of(program.module, "fc.weight").data
    weight[0, 3] = -0.0
    mask = weight != 0
    return replace(program, encodings={"fc.weight": Sparse.from_dense(weight, mask)})


@breaks("captured", r"encoding of 'fc\.weight': .* dense weights only, found sparse 100\.0%")
def compressed_at_capture(program: Program) -> Program:
    return replace(program, encodings=_sparse(program, "fc.weight"))


@breaks("captured", r"node 'relu': .* no activation format, found one")
def format_at_capture(program: Program) -> Program:
    annotate(_find(program, "relu"), ActivationFormat(8, 4))
    return program


@breaks("lowered", r"node 'linear': .* an operator for 'fc\.weight' in its encoding, found aten")
def plain_reader_when_lowered(program: Program) -> Program:
    return replace(program, stage=Stage.LOWERED, encodings=_sparse(program, "fc.weight"))


@breaks("fixed-point", r"node 'shohin_fixed_quantize': .* its arguments, found none")
def rounding_without_a_format(program: Program) -> Program:
    relu = _find(program, "relu")
    with program.graph.inserting_after(relu):
        made = program.graph.call_function(fixed_quantize, (relu, 8, 4))
    made.name = "shohin_fixed_quantize"
    return program


@breaks("runnable", r"node 'linear': .* a graph that runs, found aten\.linear\.default refuses")
def wrong_shapes(program: Program) -> Program:
    _find(program, "linear").update_arg(0, _find(program, "image"))
    return program


@breaks("runnable", r"output: .* one tensor or a flat tuple of tensors, found 3")
def number_as_output(program: Program) -> Program:
    with program.graph.inserting_before(_find(program, "output")):
        size = program.graph.call_function(aten.sym_size.int, (_find(program, "image"), 0))
    _find(program, "output").args = (size,)
    return program


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named(case, program):
    change, text = BROKEN[case]
    with pytest.raises(VerifyError, match=text) as error:
        verify(change(program))
    assert f"[{case.partition(':')[0]}]" in str(error.value)


def test_every_rule_has_a_test_that_breaks_it():
    assert {case.partition(":")[0] for case in BROKEN} == {rule.name for rule in RULES}


def test_the_pass_and_the_lines_around_the_fault_are_shown(program, golden):
    _find(program, "relu").target = aten.relu_.default
    with pytest.raises(VerifyError) as error:
        verify(program, after="prune{density=0.1}")
    golden(str(error.value))


def test_valid_programs_of_each_stage(program):
    verify(program)
    annotated = replace(program, stage=Stage.ANNOTATED, encodings=_sparse(program, "fc.weight"))
    annotate(_find(program, "relu"), ActivationFormat(8, 4))
    verify(annotated)
    verify(replace(program, stage=Stage.LOWERED))


def test_arithmetic_on_sizes_is_known(program):
    with program.graph.inserting_before(_find(program, "output")):
        size = program.graph.call_function(aten.sym_size.int, (_find(program, "image"), 0))
        program.graph.call_function(operator.mul, (size, 2))
        program.graph.call_function(math.floor, (size,))
    verify(program)


def test_nan_weights_equal_themselves(program):
    weight = tensor_of(program.module, "fc.weight").data
    weight[0, 0] = float("nan")
    verify(replace(program, encodings={"fc.weight": Dense(weight.clone())}))
