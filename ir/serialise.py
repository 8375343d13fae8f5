"""Programs in files: one safetensors file whose metadata holds the graph; no pickle.

The metadata has one entry, ``shohin``: a JSON object with the format's name and version, a digest
over everything else, the body (graph, inputs, stage, facts, history, encodings) and what the
caller adds. A weight with an encoding is stored in its encoded form only. The same program gives
the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from shohin.errors import ArtifactError
from shohin.ir.encodings import Dense, Encoding, Json, decode, encode
from shohin.ir.files import atomic_path
from shohin.ir.graph_json import decode_graph, encode_graph
from shohin.ir.program import Fact, InputSpec, Program, Stage, make_owner, tensor_of, weight_names

FORMAT = "shohin"
VERSION = 1
_Path: TypeAlias = str | PathLike[str]
_DENSE, _ENCODED = "dense/", "encoded/"
_BROKEN = "write it again, or take an intact copy"


@dataclass(frozen=True)
class Header:
    """What a program file says of itself.

    Attributes:
        version: version of the file format.
        digest: SHA-256 of everything else in the file.
        name: what the program is called.
        stage: how far it has come.
        facts: properties that hold.
        history: canonical text of each pass that ran.
        inputs: one specification per input.
        extra: what the writer of the file added.
    """

    version: int
    digest: str
    name: str
    stage: Stage
    facts: frozenset[Fact]
    history: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    extra: Mapping[str, Json]


def save_program(program: Program, path: _Path, extra: Mapping[str, Json] | None = None) -> None:
    """Write a program to one file, whole or not at all.

    Args:
        program: the program.
        path: the file.
        extra: plain values to keep with it; `read_header` gives them back.

    Raises:
        ArtifactError: when the file cannot be written, or a node cannot be held by a file.
    """
    body, tensors = _take_apart(program)
    added = dict(extra or {})
    header = {
        "format": FORMAT,
        "version": VERSION,
        "digest": _digest({"body": body, "extra": added}, tensors),
        "body": body,
        "extra": added,
    }
    with atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(tensors, temporary, {FORMAT: _canonical(header)})
        temporary.chmod(mode)


def load_program(path: _Path) -> Program:
    """Read a program that `save_program` wrote. Nothing is run.

    Raises:
        ArtifactError: when the file is missing, truncated, foreign, corrupted or of a newer
            version.
    """
    header, tensors = _read(path, with_tensors=True)
    found = _digest({"body": header["body"], "extra": header["extra"]}, tensors)
    if found != header["digest"]:
        problem = (
            f"corrupted: expected SHA-256 {str(header['digest'])[:16]}..., got {found[:16]}..."
        )
        raise ArtifactError(str(path), problem, _BROKEN)
    try:
        return _put_together(header["body"], tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error.where}", error.problem, error.hint) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(str(path), f"malformed: {error!r}", _BROKEN) from error


def read_header(path: _Path) -> Header:
    """Read what a program file says of itself, without its tensors and without the digest check.

    Raises:
        ArtifactError: when the file is missing, truncated, foreign or of a newer version.
    """
    header, _ = _read(path, with_tensors=False)
    body = header["body"]
    try:
        return Header(
            version=int(header["version"]),
            digest=str(header["digest"]),
            name=str(body["name"]),
            stage=Stage(body["stage"]),
            facts=frozenset(Fact(fact) for fact in body["facts"]),
            history=tuple(body["history"]),
            inputs=tuple(_decode_input(spec) for spec in body["inputs"]),
            extra=header["extra"],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(str(path), f"malformed: {error!r}", _BROKEN) from error


def content_hash(program: Program) -> str:
    """SHA-256 of a program: graph, weights, encodings, inputs, stage, facts and history.

    Raises:
        ArtifactError: when a node cannot be described.
    """
    body, tensors = _take_apart(program)
    return _digest({"body": body}, tensors)


def _take_apart(program: Program) -> tuple[dict[str, Json], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    weights = _describe_weights(program, tensors)
    encodings: dict[str, Json] = {}
    for name in sorted(program.encodings.keys() & weights.keys()):
        description, parts = encode(program.encodings[name])
        encodings[name] = description
        tensors |= {f"{_ENCODED}{name}/{key}": part for key, part in parts.items()}
    body: dict[str, Json] = {
        "name": program.name,
        "stage": program.stage.value,
        "facts": [*sorted(fact.value for fact in program.facts)],
        "history": [*program.history],
        "inputs": [_encode_input(spec) for spec in program.inputs],
        "graph": encode_graph(program.graph),
        "weights": weights,
        "encodings": encodings,
    }
    if program.outputs:
        body["outputs"] = [*program.outputs]
    return body, {name: _own(tensor) for name, tensor in sorted(tensors.items())}


def _describe_weights(program: Program, tensors: dict[str, Tensor]) -> dict[str, Json]:
    """Describe each weight, and add those without an encoding to the tensors, tied ones once."""
    first: dict[int, str] = {}
    weights: dict[str, Json] = {}
    for name in weight_names(program):
        tensor = tensor_of(program.module, name)
        owner = first.setdefault(id(tensor), name)
        weights[name] = {
            "parameter": isinstance(tensor, nn.Parameter),
            "trained": tensor.requires_grad,
            "tied_to": owner if owner != name else None,
        }
        if owner == name and name not in program.encodings:
            tensors[f"{_DENSE}{name}"] = tensor
    return weights


def _own(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own, as the file format asks for."""
    flat = tensor.detach().cpu().contiguous()
    whole = flat.untyped_storage().nbytes() == flat.numel() * flat.element_size()
    return flat if whole else flat.clone()


def _digest(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_canonical(described).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical(described: Mapping[str, Any]) -> str:
    return json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _encode_input(spec: InputSpec) -> Json:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "shape": [*spec.shape], "dtype": dtype}


def _decode_input(spec: Mapping[str, Any]) -> InputSpec:
    dtype = getattr(torch, str(spec["dtype"]))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown element type {spec['dtype']}")
    return InputSpec(str(spec["name"]), tuple(spec["shape"]), dtype)


def _read(path: _Path, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = _check_header(Path(path), file.metadata() or {})
            names = file.keys() if with_tensors else []
            return header, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError as error:
        raise ArtifactError(str(path), "there is no such file") from error
    except OSError as error:
        raise ArtifactError(str(path), f"cannot be read: {error}") from error
    except safetensors.SafetensorError as error:
        problem = f"truncated, or not a program file: {error}"
        raise ArtifactError(str(path), problem, _BROKEN) from error


def _check_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise ArtifactError(str(path), "a safetensors file, but not of a shohin program")
    try:
        header = json.loads(metadata[FORMAT])
        version = int(header["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(str(path), f"corrupted header: {error!r}", _BROKEN) from error
    if version > VERSION:
        problem = f"expected format version {VERSION} or older, got {version}"
        raise ArtifactError(str(path), problem, "update shohin")
    missing = {"digest", "body", "extra"} - header.keys()
    if missing:
        raise ArtifactError(str(path), f"corrupted header: no {sorted(missing)}", _BROKEN)
    return dict(header)


def _put_together(body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Program:
    encodings = {
        name: decode(description, _under(f"{_ENCODED}{name}/", tensors))
        for name, description in body["encodings"].items()
    }
    graph = decode_graph(body["graph"])
    root = nn.Module()
    _attach_weights(root, body["weights"], encodings, tensors)
    module = fx.GraphModule(root, graph)
    module.train(False)
    return Program(
        module=module,
        inputs=tuple(_decode_input(spec) for spec in body["inputs"]),
        stage=Stage(body["stage"]),
        encodings=encodings,
        facts=frozenset(Fact(fact) for fact in body["facts"]),
        history=tuple(body["history"]),
        name=str(body["name"]),
        outputs=tuple(str(name) for name in body.get("outputs", ())),
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _attach_weights(
    root: nn.Module,
    weights: Mapping[str, Any],
    encodings: Mapping[str, Encoding],
    tensors: Mapping[str, Tensor],
) -> None:
    for name, described in sorted(weights.items(), key=lambda item: item[1]["tied_to"] or ""):
        owner, leaf = make_owner(root, name)
        if described["tied_to"]:
            setattr(owner, leaf, tensor_of(root, described["tied_to"]))
            continue
        value = _value(name, encodings, tensors)
        if described["parameter"]:
            owner.register_parameter(leaf, nn.Parameter(value, bool(described["trained"])))
        else:
            owner.register_buffer(leaf, value)


def _value(name: str, encodings: Mapping[str, Encoding], tensors: Mapping[str, Tensor]) -> Tensor:
    encoding = encodings.get(name)
    if encoding is None:
        return tensors[f"{_DENSE}{name}"]
    dense = encoding.materialise()
    return dense.clone() if isinstance(encoding, Dense) else dense
