"""Programs in files; no pickle. The format is described in docs/format.md.

The header holds graph, inputs, stage, facts, history, tool versions and how each weight is stored;
every weight has a section of its own, in its encoded form only. The same program gives the same
bytes. Weights are written and read one at a time.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import torch
from torch import Tensor, fx, nn

from shohin.errors import ArtifactError, ShohinError, SpecError, near_name_hint
from shohin.ir.container.sections import BROKEN, END, Section, SectionReader, SectionWriter
from shohin.ir.container.tensors import decode_tensors, encode_tensors
from shohin.ir.container.text import deflate, inflate
from shohin.ir.encodings import (
    Dense,
    Encoding,
    Json,
    decode,
    describe_encoding,
    encoded_tensors,
    shape_of,
)
from shohin.ir.files import atomic_path
from shohin.ir.graph_json import decode_graph, encode_graph
from shohin.ir.program import (
    BATCH,
    Fact,
    InputSpec,
    Program,
    Stage,
    make_owner,
    tensor_of,
    weight_names,
)
from shohin.ir.verifier import verify
from shohin.ir.versions import tool_versions

HEADER, WEIGHT = "HEAD", "WGHT"

_Path: TypeAlias = str | PathLike[str]
_VALUES = "values"
_ALLOWANCE = 64 << 20
_MOST_RATIO = 1 << 12
"""Bytes that weights may claim: so many anyhow, and so many for each byte of the file."""

_CLAIM = 9
"""Bytes of memory for an element at most: its widest type and its place in a mask."""

_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
_VERIFIED = ("attributes", "well-formed", "known-kinds", "inputs", "output", "runnable")
"""What checksums do not tell: a file may be whole, and its graph none."""


@dataclass(frozen=True)
class Header:
    """What a program file says of itself.

    Attributes:
        version: version of the file format.
        name: what the program is called.
        stage: how far it has come.
        facts: properties that hold.
        history: canonical text of each pass that ran.
        inputs: one specification per input.
        tools: versions of what wrote the file, by name.
        extra: what the writer of the file added.
        captured_bytes: as in `Program`.
    """

    version: int
    name: str
    stage: Stage
    facts: frozenset[Fact]
    history: tuple[str, ...]
    inputs: tuple[InputSpec, ...]
    tools: Mapping[str, str]
    extra: Mapping[str, Json]
    captured_bytes: int = 0


def save_program(program: Program, path: _Path, extra: Mapping[str, Json] | None = None) -> None:
    """Write a program to one file, whole or not at all.

    Args:
        program: the program.
        path: the file.
        extra: plain values to keep with it; `read_header` gives them back.

    Raises:
        ArtifactError: when the file cannot be written, or a node or weight cannot be held by it.
    """
    header = {**_describe(program), "tools": tool_versions(), "extra": dict(extra or {})}
    text = deflate(_canonical(header))
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = SectionWriter(file)
        writer.section(HEADER, [text])
        for ordinal, name in enumerate(_stored_names(program)):
            writer.section(WEIGHT, _content(ordinal, name, program))
        writer.end()


def load_program(path: _Path) -> Program:
    """Read a program that `save_program` wrote. Nothing is run.

    Raises:
        ArtifactError: when the file is missing, truncated, foreign, corrupted or of a newer
            version.
    """
    with ProgramFile(path) as file:
        file.check()
        return file.program()


def read_header(path: _Path) -> Header:
    """Read what a program file says of itself; its weights are not looked at.

    Raises:
        ArtifactError: when the file is missing, truncated, foreign or of a newer version.
    """
    with ProgramFile(path) as file:
        return file.header


def content_hash(program: Program) -> str:
    """SHA-256 of a program: graph, weights, encodings, inputs, stage, facts and history.

    Raises:
        ArtifactError: when a node cannot be described.
    """
    digest = hashlib.sha256(_canonical(_describe(program)).encode())
    for ordinal, name in enumerate(_stored_names(program)):
        for part in _content(ordinal, name, program):
            digest.update(part)
    return digest.hexdigest()


class ProgramFile:
    """An open program file, whose weights are read when they are asked for.

    ::

        with ProgramFile("net.shohin") as file:
            file.header.history
            file.tensor("fc.weight")

    Args:
        path: the file.

    Raises:
        ArtifactError: when the file is missing, truncated, foreign, corrupted or of a newer
            version.
    """

    def __init__(self, path: _Path) -> None:
        self._path = Path(path)
        self._file = _open(self._path)
        try:
            with self._readable():
                self._reader = SectionReader(self._file, self._path)
                self._weights = self._check_sections()
                self._body = _parse(self._reader.content(self._reader.sections[0]))
                self._names = _stored_in(self._body)
                self.header = _header(self._body, self._reader.version)
                self._check_weights()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "ProgramFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes that each weight takes in the file, its section's frame included."""
        pairs = zip(self._names, self._weights, strict=True)
        return {name: section.end - section.start for name, section in pairs}

    def check(self) -> None:
        """Compare the checksum of the whole file.

        Raises:
            ArtifactError: when it is wrong.
        """
        self._reader.check_digest()

    def encoding(self, name: str) -> Encoding:
        """How a weight is stored.

        Raises:
            ArtifactError: when its section is corrupted, or there is no such weight.
        """
        if self._file.closed:
            raise ArtifactError(str(self._path), "was closed before this weight was read")
        if name not in self._names:
            where, hint = f"{self._path}: weight '{name}'", near_name_hint(name, self._names)
            raise ArtifactError(where, "the file has none of that name", hint)
        ordinal = self._names.index(name)
        with self._readable(f"weight '{name}'"):
            found, tensors = decode_tensors(self._reader.content(self._weights[ordinal]))
            if found != ordinal:
                raise SpecError("weights", f"expected weight {ordinal}, got {found}")
            description = self._body["encodings"].get(name)
            if description is None:
                return Dense(tensors[_VALUES])
            return decode(description, tensors)

    def tensor(self, name: str) -> Tensor:
        """A weight in its dense form."""
        return self.encoding(name).materialise()

    def program(self) -> Program:
        """The program."""
        with self._readable():
            body = self._body
            graph = decode_graph(body["graph"])
            root, encodings = self._attach_weights()
            module = fx.GraphModule(root, graph)
            module.train(False)
            header = self.header
            program = Program(
                module=module,
                inputs=header.inputs,
                stage=header.stage,
                encodings=encodings,
                facts=header.facts,
                history=header.history,
                name=header.name,
                outputs=tuple(str(name) for name in body.get("outputs", ())),
                captured_bytes=header.captured_bytes,
            )
            verify(program, rules=_VERIFIED)
            return program

    def _attach_weights(self) -> tuple[nn.Module, dict[str, Encoding]]:
        root, encodings = nn.Module(), dict[str, Encoding]()
        weights: Mapping[str, Any] = self._body["weights"]
        for name, described in sorted(weights.items(), key=lambda item: item[1]["tied_to"] or ""):
            owner, leaf = make_owner(root, name)
            tied = described["tied_to"]
            if tied:
                setattr(owner, leaf, tensor_of(root, tied))
                if name in self._body["encodings"]:
                    encodings[name] = encodings[tied]
                continue
            encoding = self.encoding(name)
            value = encoding.materialise()
            if name in self._body["encodings"]:
                encodings[name] = encoding
                value = value.clone() if isinstance(encoding, Dense) else value
            if described["parameter"]:
                owner.register_parameter(leaf, nn.Parameter(value, bool(described["trained"])))
            else:
                owner.register_buffer(leaf, value)
        return root, encodings

    def _check_sections(self) -> tuple[Section, ...]:
        known = {HEADER, WEIGHT, END}
        for section in self._reader.sections:
            if section.tag not in known and section.required:
                problem = f"has a section '{section.tag}' that this version does not know"
                raise ArtifactError(str(self._path), problem, "update shohin")
        headers = [section.tag == HEADER for section in self._reader.sections]
        if not headers[0] or sum(headers) > 1:
            problem = f"expected one header, and first, found {sum(headers)}"
            raise ArtifactError(str(self._path), f"corrupted: {problem}", BROKEN)
        return tuple(one for one in self._reader.sections if one.tag == WEIGHT)

    def _check_weights(self) -> None:
        if len(self._names) != len(self._weights):
            problem = f"expected {len(self._names)} weights, found {len(self._weights)}"
            raise SpecError("weights", problem)
        claimed = sum(_claim(described) for described in self._body["encodings"].values())
        most = _ALLOWANCE + _MOST_RATIO * self._reader.sections[-1].end
        if claimed > most:
            raise SpecError("weights", f"claim {claimed} bytes, more than the {most} believed")

    @contextmanager
    def _readable(self, what: str = "") -> Iterator[None]:
        """Turn whatever goes wrong with malformed content into an error that names the file."""
        where = f"{self._path}: {what}" if what else str(self._path)
        try:
            yield
        except ArtifactError as error:
            if error.where.startswith(str(self._path)):
                raise
            raise ArtifactError(f"{where}: {error.where}", error.problem, error.hint) from error
        except ShohinError as error:
            raise ArtifactError(where, f"corrupted: {error}", BROKEN) from error
        except MemoryError as error:
            raise ArtifactError(where, "needs more memory than there is") from error
        except OSError as error:
            raise ArtifactError(where, f"cannot be read: {error.strerror or error}") from error
        except _MALFORMED as error:
            raise ArtifactError(where, f"malformed: {error!r}", BROKEN) from error


def _open(path: Path) -> BinaryIO:
    try:
        # Of pipes and devices, opening alone may never end.
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ArtifactError(str(path), "is no regular file")
        return path.open("rb")
    except ValueError as error:
        raise ArtifactError(repr(str(path)), f"is no name of a file: {error}") from error
    except FileNotFoundError as error:
        raise ArtifactError(str(path), "there is no such file") from error
    except IsADirectoryError as error:
        raise ArtifactError(str(path), "is a folder, not a program file") from error
    except OSError as error:
        raise ArtifactError(str(path), f"cannot be read: {error.strerror or error}") from error


def _parse(content: bytes) -> dict[str, Any]:
    body = json.loads(inflate(content))
    if not isinstance(body, dict) or not isinstance(body.get("encodings"), dict):
        raise SpecError("header", "expected an object")
    return body


def _header(body: Mapping[str, Any], version: int) -> Header:
    return Header(
        version=version,
        name=str(body["name"]),
        stage=Stage(body["stage"]),
        facts=frozenset(Fact(fact) for fact in body["facts"]),
        history=tuple(str(text) for text in body["history"]),
        inputs=tuple(_decode_input(spec) for spec in body["inputs"]),
        tools={str(name): str(version) for name, version in body["tools"].items()},
        extra=dict(body["extra"]),
        captured_bytes=int(body.get("captured_bytes", 0)),
    )


def _describe(program: Program) -> dict[str, Json]:
    owners = _owners(program)
    encodings: dict[str, Json] = {}
    for name in sorted(program.encodings.keys() & owners.keys()):
        owned = owners[name] == name
        encodings[name] = describe_encoding(program.encodings[name]) if owned else None
    body: dict[str, Json] = {
        "name": program.name,
        "stage": program.stage.value,
        "facts": [*sorted(fact.value for fact in program.facts)],
        "history": [*program.history],
        "inputs": [_encode_input(spec) for spec in program.inputs],
        "graph": encode_graph(program.graph),
        "weights": {name: _describe_weight(program, name, owners[name]) for name in owners},
        "encodings": encodings,
    }
    if program.outputs:
        body["outputs"] = [*program.outputs]
    if program.captured_bytes:
        body["captured_bytes"] = program.captured_bytes
    return body


def _describe_weight(program: Program, name: str, owner: str) -> Json:
    tensor = tensor_of(program.module, name)
    return {
        "parameter": isinstance(tensor, nn.Parameter),
        "trained": tensor.requires_grad,
        "tied_to": owner if owner != name else None,
    }


def _owners(program: Program) -> dict[str, str]:
    """The name that each weight is stored by: of tied ones the first that has an encoding."""
    names = sorted(weight_names(program), key=lambda name: (name not in program.encodings, name))
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(id(tensor_of(program.module, name)), name)
    return {name: first[id(tensor_of(program.module, name))] for name in sorted(names)}


def _stored_names(program: Program) -> list[str]:
    return sorted(set(_owners(program).values()))


def _stored_in(body: Mapping[str, Any]) -> list[str]:
    return sorted(name for name, one in body["weights"].items() if not one["tied_to"])


def _content(ordinal: int, name: str, program: Program) -> Iterator[bytes | memoryview]:
    encoding = program.encodings.get(name) or Dense(tensor_of(program.module, name).detach())
    try:
        yield from encode_tensors(ordinal, encoded_tensors(encoding))
    except SpecError as error:
        raise ArtifactError(f"weight '{name}'", error.problem) from error


def _claim(described: object) -> int:
    """Bytes that a weight takes in memory, as its description has it.

    Raises:
        SpecError: when the description claims more codes or inner elements than the weight has
            elements.
    """
    if described is None:
        return 0
    if not isinstance(described, dict) or not isinstance(described.get("attributes"), dict):
        raise SpecError("weights", f"expected how one is stored, got {described!r}")
    attributes = described["attributes"]
    inner = max(map(_claim, described.get("children", {}).values()), default=0)
    if "shape" not in attributes:
        return inner
    count, codes = math.prod(shape_of(attributes)), attributes.get("codes", 0)
    if not isinstance(codes, int) or not 0 <= codes <= count:
        raise SpecError("weights", f"expected at most {count} codes, got {codes!r}")
    if inner > _CLAIM * count:
        raise SpecError("weights", f"expected at most {count} kept elements, got more")
    return _CLAIM * count


def _canonical(described: Mapping[str, Any]) -> str:
    return json.dumps(described, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _encode_input(spec: InputSpec) -> Json:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "shape": [*spec.shape], "dtype": dtype}


def _decode_input(spec: Mapping[str, Any]) -> InputSpec:
    sizes = spec["shape"]
    if not all(size == BATCH or (type(size) is int and size >= 0) for size in sizes):
        raise ValueError(f"expected sizes or '{BATCH}', got {sizes!r}")
    dtype = getattr(torch, str(spec["dtype"]))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown element type {spec['dtype']}")
    return InputSpec(str(spec["name"]), tuple(spec["shape"]), dtype)
