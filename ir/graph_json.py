"""Graphs as JSON, for files and hashes."""

import re
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import fx

from shohin.errors import ArtifactError
from shohin.ir.annotations import annotate, annotations, decode_annotation, encode_annotation
from shohin.ir.encodings import Json
from shohin.ir.targets import find_target, name_target

_TORCH_VALUES: dict[str, type[object]] = {
    "dtype": torch.dtype,
    "memory_format": torch.memory_format,
    "layout": torch.layout,
}

_OPERATIONS = ("placeholder", "get_attr", "call_function", "output")

_UNQUOTABLE = re.compile(r"""["'\\\x00-\x1f\x7f]""")
"""What cannot stand between quotation marks."""


def encode_graph(graph: fx.Graph) -> list[Json]:
    """The nodes of a graph in order: operation, name, target, arguments, annotations.

    Raises:
        ArtifactError: naming a node whose operator or argument a file cannot hold.
    """
    return [_encode_node(node) for node in graph.nodes]


def decode_graph(nodes: list[Json]) -> fx.Graph:
    """The graph that `encode_graph` described.

    Raises:
        ArtifactError: when the description is malformed or names an unknown operator.
    """
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for description in nodes:
        if not isinstance(description, dict):
            raise ArtifactError("graph", f"expected an object for each node, got {description}")
        node = _decode_node(graph, description, made)
        made[node.name] = node
    return graph


def _encode_node(node: fx.Node) -> Json:
    target = name_target(node.target) if node.op == "call_function" else str(node.target)
    if target is None:
        raise ArtifactError(
            f"node '{node.name}'",
            f"a file cannot hold the function {node.target}",
            "register it as an operator with torch.library",
        )
    try:
        args = [_encode(value) for value in node.args]
        kwargs = {key: _encode(value) for key, value in node.kwargs.items()}
    except TypeError as error:
        raise ArtifactError(f"node '{node.name}'", str(error)) from error
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": args,
        "kwargs": kwargs,
        "annotations": [encode_annotation(carried) for carried in annotations(node)],
    }


def _decode_node(
    graph: fx.Graph, description: Mapping[str, Json], made: Mapping[str, fx.Node]
) -> fx.Node:
    try:
        op, name, text = (str(description[key]) for key in ("op", "name", "target"))
        args = tuple(_decode(value, made) for value in _as_list(description["args"]))
        kwargs = _decode({"dict": description["kwargs"]}, made)
        carried = [decode_annotation(item) for item in _as_list(description["annotations"])]
        _check_source(op, text, kwargs)
        target = find_target(text) if op == "call_function" else text
        node = graph.create_node(op, target, args, kwargs, name=name)
    except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise ArtifactError("graph", f"a node is malformed: {error!r}") from error
    if node.name != name:
        raise ArtifactError("graph", f"two nodes are named '{name}', or the name is no valid one")
    for annotation in carried:
        annotate(node, annotation)
    return node


def _check_source(op: str, target: str, names: Mapping[str, Any]) -> None:
    """Refuse texts that are no names: PyTorch makes the source of a function from them."""
    if op not in _OPERATIONS:
        raise ValueError(f"expected one of {', '.join(_OPERATIONS)}, got {op!r}")
    if op == "placeholder" and not _is_name(target):
        raise ValueError(f"{target!r} is no name of an input")
    parts = target.split(".")
    if op == "get_attr" and (
        _UNQUOTABLE.search(target) or "" in parts or any(map(iskeyword, parts))
    ):
        raise ValueError(f"{target!r} is no name of a weight")
    for name in names:
        if not _is_name(name):
            raise ValueError(f"{name!r} is no name of an argument")


def _is_name(text: str) -> bool:
    return text.isidentifier() and not iskeyword(text)


def _as_list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r}")
    return value


def _encode(value: object) -> Json:
    """The JSON of an argument: plain values as they are, all else as ``{kind: value}``."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, list):
        return [_encode(item) for item in value]
    for kind, (types, encode, _) in _CODECS.items():
        if isinstance(value, types):
            return {kind: encode(value)}
    raise TypeError(f"a file cannot hold an argument of type {type(value).__name__}")


def _decode(value: Json, made: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError(f"expected one key, got {list(value)}")
    ((kind, inner),) = value.items()
    return _CODECS[kind][2](inner, made)


def _encode_torch(value: object) -> Json:
    return str(value).removeprefix("torch.")


def _decode_torch(kind: str) -> "_Decoder":
    def decode(text: Json, made: Mapping[str, fx.Node]) -> object:
        found = getattr(torch, str(text), None)
        if not isinstance(found, _TORCH_VALUES[kind]):
            raise ValueError(f"torch has no {kind} {text}")
        return found

    return decode


def _encode_complex(value: Any) -> Json:
    return [value.real.hex(), value.imag.hex()]


def _decode_complex(parts: Json, made: Mapping[str, fx.Node]) -> complex:
    real, imaginary = (float.fromhex(str(part)) for part in _as_list(parts))
    return complex(real, imaginary)


def _decode_dict(items: Json, made: Mapping[str, fx.Node]) -> dict[str, Any]:
    if not isinstance(items, dict):
        raise TypeError(f"expected an object, got {items!r}")
    return {key: _decode(item, made) for key, item in items.items()}


_Decoder = Callable[[Json, Mapping[str, fx.Node]], Any]
# Floats are kept as hexadecimal text: exact, and infinities and NaN are no valid JSON.
_CODECS: dict[str, tuple[type[Any], Callable[[Any], Json], _Decoder]] = {
    "node": (fx.Node, lambda node: str(node.name), lambda name, made: made[str(name)]),
    "float": (float, lambda value: value.hex(), lambda text, made: float.fromhex(str(text))),
    "complex": (complex, _encode_complex, _decode_complex),
    "tuple": (
        tuple,
        lambda items: [_encode(item) for item in items],
        lambda items, made: tuple(_decode(item, made) for item in _as_list(items)),
    ),
    "dict": (
        dict,
        lambda items: {str(key): _encode(item) for key, item in items.items()},
        _decode_dict,
    ),
    "slice": (
        slice,
        lambda value: [_encode(part) for part in (value.start, value.stop, value.step)],
        lambda parts, made: slice(*(_decode(part, made) for part in _as_list(parts))),
    ),
    "device": (torch.device, str, lambda text, made: torch.device(str(text))),
    "dtype": (torch.dtype, _encode_torch, _decode_torch("dtype")),
    "memory_format": (torch.memory_format, _encode_torch, _decode_torch("memory_format")),
    "layout": (torch.layout, _encode_torch, _decode_torch("layout")),
    "ellipsis": (type(...), lambda value: None, lambda value, made: ...),
}
