"""Typed annotations on the nodes of a graph.

An annotation is a frozen dataclass; a node carries at most one of each type, in
``node.meta["shohin"]``. Copies of the graph keep them.
"""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from shohin.errors import ArtifactError, near_name_hint
from shohin.ir.encodings import Json

_KEY = "shohin"
_KINDS: dict[str, type[object]] = {}
AnnotationType = TypeVar("AnnotationType")


def register_annotation(kind: type[AnnotationType]) -> type[AnnotationType]:
    """Class decorator that lets files hold an annotation.

    Its fields are plain values (numbers, texts, tuples of these).
    """
    _KINDS[kind.__name__] = kind
    return kind


@register_annotation
@dataclass(frozen=True)
class Origin:
    """Where a node comes from.

    Attributes:
        module: dotted path of the source module (``layer1.0.conv1``), empty at the top.
        module_type: class name of that module (``Conv2d``).
        made_by: name of the pass that made the node, empty when it was captured.
        replaced: names of the captured nodes that it stands for.
    """

    module: str
    module_type: str = ""
    made_by: str = ""
    replaced: tuple[str, ...] = ()


@register_annotation
@dataclass(frozen=True)
class ActivationFormat:
    """Fixed-point format of a node's output: ``value = integer * 2**-fraction``.

    Attributes:
        bits: width of the two's complement integer.
        fraction: fractional length; may be negative or exceed `bits`.
    """

    bits: int
    fraction: int


def annotate(node: fx.Node, annotation: object) -> None:
    """Attach an annotation, replacing one of the same type."""
    node.meta[_KEY] = {**node.meta.get(_KEY, {}), type(annotation): annotation}


def annotation(node: fx.Node, kind: type[AnnotationType]) -> AnnotationType | None:
    """The node's annotation of that type, or None."""
    found = node.meta.get(_KEY, {}).get(kind)
    return found if isinstance(found, kind) else None


def annotations(node: fx.Node) -> tuple[object, ...]:
    """Every annotation of a node, ordered by type name so that printing is stable."""
    carried = node.meta.get(_KEY, {})
    return tuple(carried[kind] for kind in sorted(carried, key=lambda kind: kind.__name__))


def remove_annotation(node: fx.Node, kind: type[object]) -> None:
    """Drop the annotation of that type, if there is one."""
    carried = node.meta.get(_KEY, {})
    node.meta[_KEY] = {key: value for key, value in carried.items() if key is not kind}


def encode_annotation(carried: object) -> Json:
    """The JSON form of an annotation.

    Raises:
        ArtifactError: when its class is not registered.
    """
    kind = type(carried)
    if _KINDS.get(kind.__name__) is not kind or not dataclasses.is_dataclass(carried):
        raise ArtifactError(
            f"annotation {kind.__name__}",
            "expected a registered dataclass",
            "decorate it with register_annotation",
        )
    fields = {field.name: getattr(carried, field.name) for field in dataclasses.fields(carried)}
    return {"kind": kind.__name__, **fields}


def decode_annotation(description: Json) -> object:
    """The annotation that `encode_annotation` described.

    Raises:
        ArtifactError: when the description is malformed or names an unknown class.
    """
    if not isinstance(description, dict):
        raise ArtifactError("annotation", f"expected an object, got {description}")
    fields = {key: _freeze(value) for key, value in description.items() if key != "kind"}
    name = str(description.get("kind"))
    if name not in _KINDS:
        raise ArtifactError("annotation", f"unknown kind '{name}'", near_name_hint(name, [*_KINDS]))
    try:
        return _KINDS[name](**fields)
    except TypeError as error:
        raise ArtifactError(f"annotation '{name}'", f"cannot be rebuilt: {error}") from error


def _freeze(value: Json) -> object:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value
