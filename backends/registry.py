"""Backends by the kind of target they compile for: built-in ones, and other people's packages'.

A package offers a backend by an entry point of the group ``shohin.backends``, named after the kind
of target; one class may stand under several kinds::

    [project.entry-points."shohin.backends"]
    npu = "my_package.backend:NpuBackend"
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from shohin.backends.base import Backend, TargetVariant
from shohin.backends.targets import format_target_text, read_target, written_target
from shohin.errors import ArtifactError, ShohinError, SpecError, near_name_hint
from shohin.passes.option_docs import OptionDescription, describe_options
from shohin.spec import Source

GROUP = "shohin.backends"
_BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "cpu": "shohin.backends.tvm.backend:TvmBackend",
        "arm": "shohin.backends.tvm.backend:TvmBackend",
        "armv7": "shohin.backends.tvm.backend:TvmBackend",
        "riscv64": "shohin.backends.tvm.backend:TvmBackend",
        "cuda": "shohin.backends.tvm.cuda.backend:CudaBackend",
        "reference": "shohin.backends.reference:ReferenceBackend",
    }
)


@dataclass(frozen=True)
class Target:
    """Where a program will run, and what compiles it for there.

    Attributes:
        kind: the kind of target, e.g. ``cpu``.
        text: canonical text, with the options that are not at their defaults.
        backend: what compiles for it.
        options: instance of the kind's dataclass of options.
    """

    kind: str
    text: str
    backend: Backend
    options: Any


@dataclass(frozen=True)
class TargetDescription:
    """What a kind of target is and takes.

    Attributes:
        kind: its name in a target's text.
        summary: the first line of its docstring.
        doc: its docstring up to the options.
        options: its options, in order.
        variants: the processors there are.
    """

    kind: str
    summary: str
    doc: str
    options: tuple[OptionDescription, ...]
    variants: tuple[TargetVariant, ...]


def describe_target(kind: str) -> TargetDescription:
    """What a kind of target is and takes.

    Raises:
        SpecError: when there is no such kind.
        ArtifactError: when the backend of another package cannot be used.
    """
    if kind not in target_kinds():
        raise SpecError("targets", f"unknown target '{kind}'", near_name_hint(kind, target_kinds()))
    backend = backend_class(kind)
    owner = backend.targets[kind]
    doc = (inspect.getdoc(owner) or "").partition("\nAttributes:")[0].strip()
    summary = doc.partition("\n")[0]
    return TargetDescription(kind, summary, doc, describe_options(owner), backend().variants(kind))


def target_kinds() -> tuple[str, ...]:
    """Every known kind of target: the built-in ones, then those of other packages."""
    return tuple(dict.fromkeys([*_BUILT_IN, *sorted(point.name for point in _entry_points())]))


def parse_target(text: str) -> Target:
    """Read a target.

    Args:
        text: a kind with options, e.g. ``cpu{arch=x86-64-v3 threads=2}``.

    Raises:
        SpecError: with a caret under the exact column: on a syntax error, an unknown kind or
            option, or a value of a wrong type or out of range.
        ArtifactError: when the backend of another package cannot be used.
    """
    kind = written_target(text)
    if kind.name not in target_kinds():
        hint = near_name_hint(kind.name, target_kinds())
        raise Source(text, "target").error(kind.column, f"unknown target '{kind.name}'", hint)
    backend = backend_class(kind.name)
    options = read_target(text, backend.targets)
    return Target(kind.name, format_target_text(kind.name, options), backend(), options)


def backend_class(kind: str) -> type[Backend]:
    """The class that compiles for a kind of target, imported at first use.

    Args:
        kind: a name of `target_kinds`.

    Raises:
        ArtifactError: when nothing offers that kind, several packages do, or what is offered
            cannot be imported or is no backend for it.
    """
    offers = list(_offers(kind))
    if not offers:
        hint = near_name_hint(kind, target_kinds())
        raise ArtifactError(f"target '{kind}'", "no backend compiles for it", hint)
    if len(offers) > 1:
        sources = " and ".join(source for source, _ in offers)
        raise ArtifactError(f"target '{kind}'", f"offered by {sources}", "uninstall all but one")
    return _load(kind, *offers[0])


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _offers(kind: str) -> Iterator[tuple[str, str]]:
    if kind in _BUILT_IN:
        yield "shohin", _BUILT_IN[kind]
    # One installation may be listed twice, as an editable one and its metadata on the path.
    yield from sorted({(_package(p), p.value) for p in _entry_points() if p.name == kind})


def _package(point: EntryPoint) -> str:
    return f"package '{point.dist.name}'" if point.dist else "an unknown package"


def _load(kind: str, source: str, value: str) -> type[Backend]:
    module, _, attribute = value.partition(":")
    try:
        found = getattr(import_module(module.strip()), attribute.strip())
    except ShohinError:
        raise
    except Exception as error:
        problem = f"'{value}' of {source} cannot be imported: {type(error).__name__}: {error}"
        raise ArtifactError(f"target '{kind}'", problem) from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ArtifactError(f"target '{kind}'", f"'{value}' of {source} is not a Backend")
    if kind not in found.targets:
        problem = f"'{value}' of {source} compiles for {', '.join(sorted(found.targets))} only"
        raise ArtifactError(f"target '{kind}'", problem)
    return found
