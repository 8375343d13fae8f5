from dataclasses import dataclass

import pytest
from torch import fx

from shohin.errors import ArtifactError
from shohin.ir import (
    ActivationFormat,
    Origin,
    annotate,
    annotation,
    annotations,
    register_annotation,
    remove_annotation,
)
from shohin.ir.annotations import decode_annotation, encode_annotation


@dataclass(frozen=True)
class Unregistered:
    value: int


@pytest.fixture
def node() -> fx.Node:
    return fx.Graph().placeholder("x")


def test_one_annotation_of_each_type(node):
    annotate(node, Origin("conv1"))
    annotate(node, ActivationFormat(8, 5))
    annotate(node, ActivationFormat(4, 2))
    assert annotation(node, ActivationFormat) == ActivationFormat(4, 2)
    assert annotations(node) == (ActivationFormat(4, 2), Origin("conv1"))
    remove_annotation(node, Origin)
    assert annotation(node, Origin) is None


def test_copies_of_a_graph_have_annotations_of_their_own(node):
    annotate(node, Origin("conv1"))
    copied = fx.Graph()
    copied.graph_copy(node.graph, {})
    twin = next(iter(copied.nodes))
    annotate(twin, ActivationFormat(8, 5))
    assert annotation(twin, Origin) == Origin("conv1")
    assert annotation(node, ActivationFormat) is None


@pytest.mark.parametrize(
    "carried", [ActivationFormat(8, -2), Origin("conv1", "Conv2d", "fold-bn", ("conv", "bn"))]
)
def test_round_trip(carried):
    assert decode_annotation(encode_annotation(carried)) == carried


def test_other_classes_are_kept_once_registered():
    with pytest.raises(ArtifactError, match="decorate it with register_annotation"):
        encode_annotation(Unregistered(1))
    register_annotation(Unregistered)
    assert decode_annotation(encode_annotation(Unregistered(1))) == Unregistered(1)


@pytest.mark.parametrize(
    ("description", "text"),
    [
        (3, "annotation: expected an object, got 3"),
        ({"kind": "Orogin"}, "annotation: unknown kind 'Orogin'; did you mean 'Origin'?"),
        ({"kind": "Origin", "colour": 1}, "annotation 'Origin': cannot be rebuilt: "),
    ],
)
def test_malformed_descriptions(description, text):
    with pytest.raises(ArtifactError) as error:
        decode_annotation(description)
    assert str(error.value).startswith(text)
