import json
import math
import operator
import os
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
from shohin.ir.codebook import Codebook
from shohin.ir.container.sections import SectionReader, SectionWriter
from shohin.ir.container.text import deflate, inflate
from shohin.ir.graph_json import decode_graph, encode_graph
from shohin.ir.serialise import ProgramFile
from shohin.ir.targets import find_target, name_target

aten = torch.ops.aten
IMAGES = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def _sparsify(program: Program, name: str) -> Program:
    weight = tensor_of(program.module, name).data
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 4 == 0
    weight[~mask] = 0
    return replace(program, encodings={name: Sparse.from_dense(weight, mask)})


def _rewrite_header(path: Path, change: Any) -> None:
    """Change the header of a program file, all checksums put right."""
    with path.open("rb") as file:
        reader = SectionReader(file, path)
        contents = [(section.tag, reader.content(section)) for section in reader.sections[:-1]]
    header = json.loads(inflate(contents[0][1]))
    change(header)
    with path.open("wb") as file:
        writer = SectionWriter(file)
        writer.section("HEAD", [deflate(json.dumps(header))])
        for tag, content in contents[1:]:
            writer.section(tag, [content])
        writer.end()


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
    assert (header.name, header.stage, header.version) == ("residual", Stage.CAPTURED, 2)
    assert header.tools["torch"] == torch.__version__
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


@pytest.mark.parametrize("cut", [0, 4, 9, 10, 100, 1000, -1])
def test_truncated_files(saved, cut):
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match=r"net\.shohin: truncated"):
        load_program(saved)


def test_every_flipped_byte_is_noticed(program, tmp_path):
    small = capture(nn.Linear(3, 2), (torch.ones(1, 3),))
    path = tmp_path / "net.shohin"
    save_program(small, path)
    data = path.read_bytes()
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"^.*net\.shohin"):
            load_program(path)


def test_a_section_that_nobody_knows(saved):
    with saved.open("rb") as file:
        reader = SectionReader(file, saved)
        contents = [(section.tag, reader.content(section)) for section in reader.sections[:-1]]

    def write(tag):
        with saved.open("wb") as file:
            writer = SectionWriter(file)
            for known, content in contents:
                writer.section(known, [content])
            writer.section(tag, [b"from the future"])
            writer.end()

    expected = content_hash(load_program(saved))
    write("note")
    assert content_hash(load_program(saved)) == expected
    write("Note")
    with pytest.raises(ArtifactError, match="has a section 'Note' that this version does not know"):
        load_program(saved)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda header: header.pop("graph"), "malformed: KeyError"),
        (lambda header: header.update(stage="melted"), "'melted' is not a valid Stage"),
        (lambda header: header.update(facts=["tasty"]), "'tasty' is not a valid Fact"),
        (lambda header: header.update(encodings=[]), "corrupted: header: expected an object"),
        (lambda header: header["weights"].popitem(), "weights: expected 1"),
        (lambda header: header["graph"][0].update(op="call_magic"), "graph: a node is malformed"),
        (lambda header: header["inputs"][0].update(dtype="load"), "unknown element type load"),
    ],
)
def test_headers_that_make_no_sense(saved, change, problem):
    _rewrite_header(saved, change)
    with pytest.raises(ArtifactError, match=problem):
        load_program(saved)


def test_shapes_that_no_file_of_that_size_can_hold(program, tmp_path):
    program = _sparsify(program, "conv1.weight")
    path = tmp_path / "net.shohin"
    save_program(replace(program, stage=Stage.ANNOTATED), path)

    def enlarge(header):
        header["encodings"]["conv1.weight"]["attributes"]["shape"] = [2**20, 2**20]

    _rewrite_header(path, enlarge)
    with pytest.raises(ArtifactError, match=r"claim \d+ bytes, more than the \d+ believed"):
        load_program(path)


def test_weights_are_read_when_they_are_asked_for(program, tmp_path):
    path = tmp_path / "net.shohin"
    program = replace(_sparsify(program, "conv1.weight"), stage=Stage.ANNOTATED)
    save_program(program, path)
    with path.open("rb") as opened:
        sections = SectionReader(opened, path).sections
    names = sorted(weight_names(program))
    last = sections[1 + names.index("fc.weight")]
    data = bytearray(path.read_bytes())
    data[last.content + 5] ^= 1
    path.write_bytes(data)
    with ProgramFile(path) as file:
        assert file.encoding("conv1.weight").describe() == "sparse 25.0%"
        assert same_bits(file.tensor("fc.bias"), tensor_of(program.module, "fc.bias").detach())
        assert file.sizes["fc.weight"] == last.end - last.start
        with pytest.raises(ArtifactError, match=r"section WGHT at byte \d+: the checksum is wrong"):
            file.tensor("fc.weight")
        with pytest.raises(ArtifactError, match=r"fc\.wait.: the file has none of that name"):
            file.tensor("fc.wait")


def test_encodings_of_tied_weights_come_back(program, tmp_path):
    module = program.module
    program.graph.find_nodes(op="get_attr", target="bn2.weight")[0].target = "twin"
    module.twin = module.bn1.weight
    weight = module.bn1.weight.detach()
    encoding = Sparse.from_dense(weight, weight != 0)
    path = tmp_path / "net.shohin"
    for names in (("bn1.weight",), ("twin",), ("bn1.weight", "twin")):
        encoded = replace(program, stage=Stage.ANNOTATED, encodings=dict.fromkeys(names, encoding))
        save_program(encoded, path)
        again = load_program(path)
        assert set(again.encodings) == set(names)
        assert again.module.twin is again.module.bn1.weight
        assert content_hash(again) == content_hash(encoded)


def test_foreign_and_missing_files(tmp_path):
    (tmp_path / "text").write_text("hello world")
    with pytest.raises(ArtifactError, match="text: not a program file"):
        load_program(tmp_path / "text")
    with pytest.raises(ArtifactError, match="there is no such file"):
        load_program(tmp_path / "none")
    with pytest.raises(ArtifactError, match="is a folder, not a program file"):
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
        {"target": None},
        {"target": "lambda"},
        {"kwargs": {"if": 1}},
        {"op": "get_attr", "target": "0..weight"},
        {"op": "get_attr", "target": "layer.class"},
        {"op": "get_attr", "target": "tab\t"},
        {"op": "call_module"},
        {"op": "call_method"},
    ],
)
def test_malformed_nodes(change):
    node = {"name": "a", "target": "a", "args": [], "kwargs": {}, "annotations": []}
    with pytest.raises(ArtifactError, match=r"^graph: "):
        decode_graph([{"op": "placeholder"} | node | change])


def test_texts_of_a_file_are_never_run(saved, tmp_path):
    """PyTorch compiles source that it makes of a graph's texts: only names may get there."""
    trace = tmp_path / "trace"
    order = f"open({str(trace)!r}, 'w')"
    attacks = [
        ("placeholder", {"target": f"x={order}"}),
        ("placeholder", {"target": f"x: {order}"}),
        ("get_attr", {"target": f'0") or {order} or getattr(self, "0'}),
        ("get_attr", {"target": f"0\n    {order}\n"}),
        ("call_function", {"kwargs": {f"x={order}, y": 1}}),
        ("call_function", {"name": f"y = {order}"}),
    ]
    intact = saved.read_bytes()
    for op, change in attacks:
        saved.write_bytes(intact)

        def attack(header, op=op, change=change):
            next(node for node in header["graph"] if node["op"] == op).update(change)

        _rewrite_header(saved, attack)
        with pytest.raises(ArtifactError, match="graph: "):
            load_program(saved)
        assert not trace.exists()


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


def _write_sections(path: Path, change: Any) -> None:
    """Change the list of a program file's sections, all checksums put right."""
    with path.open("rb") as file:
        reader = SectionReader(file, path)
        contents = [(section.tag, reader.content(section)) for section in reader.sections[:-1]]
    change(contents)
    with path.open("wb") as file:
        writer = SectionWriter(file)
        for tag, content in contents:
            writer.section(tag, [content])
        writer.end()


def test_a_second_header_is_refused(saved):
    _write_sections(saved, lambda contents: contents.insert(1, ("HEAD", b"junk")))
    with pytest.raises(ArtifactError, match="expected one header, and first, found 2"):
        load_program(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["graph"].pop(), "expected one output node, found 0"),
        (lambda header: header["graph"].clear(), "expected placeholders"),
        (lambda header: header.update(inputs=[]), "expected placeholders"),
        (lambda header: header["inputs"][0].update(shape="Nabc"), "expected sizes or 'N'"),
        (lambda header: header["inputs"][0].update(shape=[{"a": 1}, None]), "expected sizes"),
        (lambda header: header["inputs"][0].update(shape=["N", -3]), "expected sizes"),
        (lambda header: header["inputs"][0].update(shape=["N", 5]), "expected a graph that runs"),
        (lambda header: header["graph"][-1]["args"].append({"float": "0x1p99999"}), "malformed"),
        (lambda header: header["graph"][-1]["args"].append({"complex": ["0x1p9999"] * 2}), "graph"),
    ],
)
def test_whole_files_whose_graph_is_none_are_refused(saved, change, message):
    _rewrite_header(saved, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_program(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("path", ["values", "codes"])
@pytest.mark.parametrize("count", [10**6, 2**40, 2**100])
def test_claims_are_compared_before_anything_is_decoded(program, tmp_path, path, count):
    program = _sparsify(program, "conv1.weight")
    weight = tensor_of(program.module, "conv1.weight").data
    mask = weight != 0
    weight[mask] = 1.0
    indices = torch.zeros(int(mask.sum()), dtype=torch.uint8)
    values = Codebook(torch.tensor([1.0, 2.0]), indices, "huffman")
    encodings = {"conv1.weight": Sparse(mask, values)}
    saved = tmp_path / "net.shohin"
    save_program(replace(program, stage=Stage.ANNOTATED, encodings=encodings), saved)

    def claim(header: Any) -> None:
        described = header["encodings"]["conv1.weight"]
        if path == "codes":
            described["attributes"]["codes"] = count
        else:
            described["children"]["values"]["attributes"]["shape"] = [count]

    _rewrite_header(saved, claim)
    with pytest.raises(ArtifactError, match=f"expected at most {mask.numel()} "):
        load_program(saved)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ArtifactError, match="is no regular file"):
            load_program(path)
    with pytest.raises(ArtifactError, match="is no name of a file"):
        load_program("a\0b")


def test_what_the_system_refuses_to_read(saved, monkeypatch):
    def read(self: SectionReader, place: int, count: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(SectionReader, "_read", read)
    with pytest.raises(ArtifactError, match="cannot be read: Input/output error"):
        load_program(saved)


def test_files_that_are_closed_and_names_that_are_not_there(saved):
    with ProgramFile(saved) as file, pytest.raises(ArtifactError, match=r"did you mean '.*1.weig"):
        file.tensor("conv1.weigth")
    with pytest.raises(ArtifactError, match="was closed before"):
        file.tensor("conv1.weight")
