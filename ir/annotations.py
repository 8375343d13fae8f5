"""Typed annotations on the nodes of a graph.

An annotation is a frozen dataclass; a node carries at most one of each type, in
``node.meta["shohin"]``. Copies of the graph keep them.
"""

from dataclasses import dataclass
from typing import TypeVar

from torch import fx

_KEY = "shohin"
AnnotationType = TypeVar("AnnotationType")


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
