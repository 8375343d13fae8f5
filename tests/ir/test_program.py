import pytest
import torch
from torch import nn

from shohin.ir import (
    Dense,
    InputSpec,
    Origin,
    annotation,
    encoding_of,
    readers,
    set_tensor,
    tensor_of,
    weight_names,
)
from shohin.ir.program import is_tensor_name, remove_unused_tensors


def test_input_specifications():
    spec = InputSpec("x", ("N", 3), torch.float32)
    assert spec.concrete(4) == (4, 3)
    assert spec.describe() == "float32[N,3]"


def test_a_copy_is_independent(program):
    copied = program.copy()
    with torch.no_grad():
        tensor_of(copied.module, "fc.weight").zero_()
    copied.graph.erase_node(next(iter(reversed(copied.graph.nodes))))
    assert tensor_of(program.module, "fc.weight").any()
    assert program.graph.find_nodes(op="output")
    node = next(iter(program.graph.find_nodes(op="output"))).all_input_nodes[0]
    assert annotation(node, Origin) is not None


def test_copies_keep_names_and_annotations(program):
    for one, two in zip(program.graph.nodes, program.copy().graph.nodes, strict=True):
        assert one.name == two.name
        assert annotation(one, Origin) == annotation(two, Origin)


def test_tensors_by_name(program):
    module = program.module
    assert tensor_of(module, "fc.weight").shape == (2, 4)
    assert not is_tensor_name(module, "fc")
    with pytest.raises(AttributeError):
        tensor_of(module, "fc.wait")


def test_setting_tensors(program):
    module = program.module
    set_tensor(module, "fc.weight", torch.ones(2, 4))
    set_tensor(module, "new.deep.codes", torch.ones(2, dtype=torch.int8))
    set_tensor(module, "bn1.running_mean", torch.ones(4))
    assert isinstance(tensor_of(module, "fc.weight"), nn.Parameter)
    assert "new.deep.codes" in dict(module.named_buffers())
    assert "bn1.running_mean" in dict(module.named_buffers())


def test_weights_and_their_readers(program):
    assert weight_names(program)[:2] == ["conv1.weight", "bn1.weight"]
    assert [node.name for node in readers(program, "fc.weight")] == ["linear"]
    assert isinstance(encoding_of(program, "fc.weight"), Dense)


def test_unused_tensors_go(program):
    set_tensor(program.module, "spare.weight", torch.ones(1))
    assert remove_unused_tensors(program.module) == ["spare.weight"]
    assert not hasattr(program.module, "spare")
    assert remove_unused_tensors(program.module) == []
