import json
import math
import operator
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from shohin.errors import ArtifactError
from shohin.ir import (
    ActivationFormat,
    Dense,
    Fact,
    InputSpec,
    Program,
    Sparse,
    Stage,
    annotate,
    annotations,
    capture,
    content_hash,
    format_program,
    load_program,
    read_header,
    same_bits,
    save_program,
    set_tensor,
    tensor_of,
    verify,
    weight_names,
)
from shohin.ir.graph_json import decode_graph, encode_graph
from shohin.ir.targets import find_target, name_target

aten = torch.ops.aten
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def _sparsify(program: Program, name: str) -> Program:
    weight = tensor_of(program.module, name).data
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 4 == 0
    weight[~mask] = 0
    return replace(program, encodings={name: Sparse.from_dense(weight, mask)})


def _rewrite_header(path: Path, change: Any) -> None:
    """Change the JSON object in the metadata of a program file, its length put right."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    outer = json.loads(data[8 : 8 + length])
    header = json.loads(outer["__metadata__"]["shohin"])
    change(header)
    outer["__metadata__"]["shohin"] = json.dumps(header)
    text = json.dumps(outer).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.fixture
def saved(program, tmp_path: Path) -> Path:
    save_program(program, tmp_path / "net.shohin", {"accuracy": 0.5})
    return tmp_path / "net.shohin"


def test_a_program_comes_back_bit_for_bit(program, tmp_path):
    program = replace(
        _sparsify(program, "conv1.weight"),
        stage=Stage.ANNOTATED,
        facts=frozenset({Fact.FUNCTIONAL, Fact.PRUNED}),
        history=("fold-bn", "prune{density=0.25}"),
    )
    annotate(
        program.graph.find_nodes(op="call_function", target=aten.conv2d.default)[0],
        ActivationFormat(8, 5),
    )
    save_program(program, tmp_path / "net.shohin")
    again = load_program(tmp_path / "net.shohin")
    verify(again)
    assert format_program(again) == format_program(program)
    assert content_hash(again) == content_hash(program)
    assert (again.inputs, again.facts, again.history) == (
        program.inputs,
        program.facts,
        program.history,
    )
    for one, two in zip(program.graph.nodes, again.graph.nodes, strict=True):
        assert (one.name, annotations(one)) == (two.name, annotations(two))
    for name in weight_names(program):
        assert same_bits(tensor_of(again.module, name), tensor_of(program.module, name))
    assert torch.equal(again.module(IMAGES), program.module(IMAGES))


def test_the_same_program_gives_the_same_bytes(program, saved, tmp_path):
    for _ in range(3):
        save_program(load_program(saved), tmp_path / "again.shohin", {"accuracy": 0.5})
        assert (tmp_path / "again.shohin").read_bytes() == saved.read_bytes()


def test_the_header_alone(saved):
    header = read_header(saved)
    assert (header.name, header.stage, header.version) == ("residual", Stage.CAPTURED, 1)
    assert header.inputs == (InputSpec("image", ("N", 3, 8, 8), torch.float32),)
    assert header.extra == {"accuracy": 0.5}


def test_encoded_weights_are_stored_only_encoded(program, tmp_path):
    big = torch.zeros(1000, 1000)
    big[::100, ::100] = 1
    set_tensor(program.module, "fc.weight", big)
    save_program(program, tmp_path / "dense.shohin")
    encodings = {"fc.weight": Sparse.from_dense(big, big != 0)}
    save_program(replace(program, encodings=encodings), tmp_path / "sparse.shohin")
    dense, sparse = (os.path.getsize(tmp_path / f"{n}.shohin") for n in ("dense", "sparse"))
    assert dense > 4_000_000
    assert sparse < 1_100_000


def test_tied_weights_are_stored_once_and_stay_tied(program, tmp_path):
    module = program.module
    program.graph.find_nodes(op="get_attr", target="bn2.weight")[0].target = "twin"
    module.twin = module.bn1.weight
    save_program(program, tmp_path / "net.shohin")
    again = load_program(tmp_path / "net.shohin").module
    assert again.twin is again.bn1.weight
    assert torch.equal(again(IMAGES), module(IMAGES))


def test_parameters_buffers_and_frozen_weights_stay_what_they_are(program, tmp_path):
    program.module.fc.weight.requires_grad_(False)
    save_program(program, tmp_path / "net.shohin")
    again = load_program(tmp_path / "net.shohin").module
    assert {n for n, _ in again.named_buffers()} == {n for n, _ in program.module.named_buffers()}
    assert not again.fc.weight.requires_grad
    assert again.fc.bias.requires_grad
    assert not again.training


def test_the_hash_tells_programs_apart(program):
    hashes = {content_hash(program)}
    hashes.add(content_hash(replace(program, history=("fold-bn",))))
    hashes.add(content_hash(replace(program, name="other")))
    with torch.no_grad():
        tensor_of(program.module, "fc.bias")[0] += 1
    hashes.add(content_hash(program))
    program.graph.find_nodes(op="call_function", target=aten.mean.dim)[0].update_arg(1, [2])
    hashes.add(content_hash(program))
    assert len(hashes) == 5


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -1])
def test_truncated_files(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"net\.shohin: .*truncated, or not a program file"):
        load_program(saved)


def test_any_flipped_byte_is_noticed(saved):
    data = saved.read_bytes()
    for position in range(3, len(data), len(data) // 97):
        broken = bytearray(data)
        broken[position] ^= 4
        saved.write_bytes(bytes(broken))
        with pytest.raises(ArtifactError):
            load_program(saved)


def test_a_newer_version(saved):
    _rewrite_header(saved, lambda header: header.update(version=2))
    for read in (load_program, read_header):
        with pytest.raises(ArtifactError, match="version 1 or older, got 2; update shohin"):
            read(saved)


def test_a_changed_graph_is_corruption(saved):
    _rewrite_header(saved, lambda header: header["body"]["graph"][0].update(name="y"))
    with pytest.raises(ArtifactError, match=r"net\.shohin: corrupted: expected SHA-256"):
        load_program(saved)


def test_foreign_and_missing_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello world")
    with pytest.raises(ArtifactError, match="a safetensors file, but not of a shohin program"):
        load_program(tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError, match="truncated, or not a program file"):
        load_program(tmp_path / "text")
    with pytest.raises(ArtifactError, match="there is no such file"):
        load_program(tmp_path / "none")
    with pytest.raises(ArtifactError, match="cannot be"):
        load_program(tmp_path)


def test_an_unwritable_path(program, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be written: no such file or directory"):
        save_program(program, tmp_path / "none" / "net.shohin")


def test_functions_that_are_no_operators_are_refused(program, tmp_path):
    program.graph.find_nodes(op="call_function", target=aten.conv2d.default)[
        0
    ].target = torch.nn.functional.relu
    with pytest.raises(ArtifactError, match=r"node 'conv2d': a file cannot hold the function"):
        save_program(program, tmp_path / "net.shohin")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["os.system.default", "torch.load", "aten.nope.default", "aten.relu", "builtins.eval"]
)
def test_only_operators_are_found(text):
    with pytest.raises(ArtifactError, match=rf"operator '{text}': torch knows no such operator"):
        find_target(text)


@pytest.mark.parametrize(
    "target", [aten.relu.default, aten.add.Tensor, operator.getitem, math.floor, torch.sym_max]
)
def test_operators_have_names(target):
    assert find_target(name_target(target)) is target


def test_arguments_of_every_sort_come_back():
    graph = fx.Graph()
    x = graph.placeholder("x")
    values = (
        None,
        True,
        3,
        2.5,
        float("-inf"),
        1 + 2j,
        "text",
        (1, (x, 2)),
        [x, [x]],
        slice(None, 3, x),
        ...,
        torch.float16,
        torch.channels_last,
        torch.strided,
        torch.device("cpu"),
    )
    graph.call_function(aten.relu.default, values, {"self": {"deep": [x]}})
    described = json.loads(json.dumps(encode_graph(graph), allow_nan=False))
    again = list(decode_graph(described).nodes)[1]
    assert repr(again.args) == repr(values)
    assert isinstance(again.args[9].step, fx.Node)
    assert repr(again.kwargs) == repr({"self": {"deep": [x]}})


@pytest.mark.parametrize(
    "change",
    [
        {"args": 3},
        {"args": [{"node": "later"}]},
        {"args": [{"dtype": "load"}]},
        {"args": [{"weird": 1}]},
        {"op": "call_magic"},
        {"annotations": None},
        {"name": "not a name"},
    ],
)
def test_malformed_nodes(change):
    node = {"name": "a", "target": "a", "args": [], "kwargs": {}, "annotations": []}
    with pytest.raises(ArtifactError, match=r"^graph: "):
        decode_graph([{"op": "placeholder"} | node | change])


def test_names_with_suffixes_come_back():
    class Many(nn.Module):
        def forward(self, list: Tensor) -> Tensor:  # noqa: A002
            return torch.relu(torch.relu(list) + list)

    program = capture(Many(), torch.ones(2, 3))
    program.graph.erase_node(_detach(program, "relu"))
    again = decode_graph(encode_graph(program.graph))
    assert [node.name for node in again.nodes] == [node.name for node in program.graph.nodes]


def _detach(program: Program, name: str) -> fx.Node:
    node = next(node for node in program.graph.nodes if node.name == name)
    node.replace_all_uses_with(node.all_input_nodes[0])
    return node


UNARY = [aten.relu.default, aten.neg.default, aten.sigmoid.default]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A small graph of random operators over one input and random weights of several types."""
    module, graph = nn.Module(), fx.Graph()
    values = [graph.placeholder("x")]
    for index in range(draw(st.integers(1, 5))):
        one, two = (values[draw(st.integers(0, len(values) - 1))] for _ in range(2))
        kind = draw(st.integers(0, 2))
        if kind == 0:
            values.append(graph.call_function(draw(st.sampled_from(UNARY)), (one,)))
        elif kind == 1:
            alpha = draw(st.floats(allow_nan=False, width=32))
            values.append(graph.call_function(aten.add.Tensor, (one, two), {"alpha": alpha}))
        else:
            seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            weight = torch.randn(3, 4, generator=seed).to(draw(st.sampled_from(DTYPES)))
            set_tensor(module, f"deep.w{index}", weight)
            values.append(
                graph.call_function(aten.mul.Tensor, (one, graph.get_attr(f"deep.w{index}")))
            )
    graph.output(tuple(values[1:]))
    program = Program(fx.GraphModule(module, graph), (InputSpec("x", ("N", 3, 4), torch.float32),))
    return _encode_some(program, draw(st.lists(st.booleans(), min_size=5, max_size=5)))


def _encode_some(program: Program, chosen: list[bool]) -> Program:
    encodings: dict[str, Dense | Sparse] = {}
    for name, flag in zip(weight_names(program), chosen, strict=False):
        weight = tensor_of(program.module, name).detach()
        encodings |= {name: Sparse.from_dense(weight, weight != 0)} if flag else {}
    return replace(program, stage=Stage.ANNOTATED, encodings=encodings)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(program=programs())
def test_random_programs_come_back(program, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "net.shohin"
    save_program(program, path)
    again = load_program(path)
    verify(again)
    assert format_program(again) == format_program(program)
    assert content_hash(again) == content_hash(program)
    x = torch.randn(2, 3, 4)
    for one, two in zip(program.module(x), again.module(x), strict=True):
        assert same_bits(one, two)
