import os
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from shohin.errors import ArtifactError
from shohin.ir import ActivationFormat, Sparse, annotate, draw, tensor_of
from shohin.ir.drawing import _quiet_unless_failing, format_bytes, render

SVG = "{http://www.w3.org/2000/svg}"


def _texts(element: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def test_nodes_show_operator_shape_origin_and_bytes(program, tmp_path: Path):
    draw(program, tmp_path / "net.svg")
    texts = _texts(ElementTree.parse(tmp_path / "net.svg").getroot())
    assert "conv2d float32[N,4,8,8]" in [" ".join(text.split()) for text in texts]
    assert "conv1, 432 B" in texts
    assert "dense" in texts


def test_every_edge_of_the_data_flow_is_drawn_once(program):
    root = ElementTree.fromstring(render(program))
    edges = [g for g in root.iter(f"{SVG}g") if g.get("class") == "edge"]
    drawn = {title.text for g in edges for title in g.iter(f"{SVG}title")}
    assert "relu->conv2d_1" in drawn
    assert "relu->add" in drawn
    assert len(drawn) == len(edges)


def test_colours_follow_the_encodings_with_a_legend(program):
    weight = tensor_of(program.module, "conv1.weight")
    encoding = Sparse.from_dense(weight, torch.ones_like(weight, dtype=torch.bool))
    node = next(node for node in program.graph.nodes if node.name == "relu")
    annotate(node, ActivationFormat(8, 5))
    texts = _texts(
        ElementTree.fromstring(render(replace(program, encodings={"conv1.weight": encoding})))
    )
    assert {"sparse", "dense", "none", "8 bits, fraction 5"} <= set(texts)


def test_what_libraries_say_is_shown_only_on_failure(capfd):
    with _quiet_unless_failing():
        os.write(2, b"warning")
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="file descriptor"), _quiet_unless_failing():
        os.close(os.write(2, b"cause") + 10_000)
    assert capfd.readouterr().err == "cause"


def test_an_unwritable_path(program, tmp_path: Path):
    with pytest.raises(ArtifactError, match="cannot be written: no such file or directory"):
        draw(program, tmp_path / "none" / "net.svg")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (2300, "2.3 KB"), (44_600_000, "44.6 MB")]
)
def test_sizes_are_readable(count, text):
    assert format_bytes(count) == text
