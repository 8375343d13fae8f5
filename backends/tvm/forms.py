"""The forms that a binary can be written in, and the C libraries that it can use."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from shohin.errors import SpecError, near_name_hint

Form: TypeAlias = Literal["so", "static", "object", "exe", "c-header"]
"""A shared library, a static one, a relocatable object, a program, the header alone."""

Libc: TypeAlias = Literal["glibc", "musl"]

SUFFIXES: Mapping[str, Form] = MappingProxyType(
    {".so": "so", ".a": "static", ".o": "object", "": "exe", ".exe": "exe", ".h": "c-header"}
)
"""Form of a binary by the ending of its file's name, where nothing else is asked for."""


def form_of(path: Path, wanted: str | None = None) -> Form:
    """The form to write to a file.

    Args:
        path: the file.
        wanted: the form; by default the one that the file's name ends in.

    Raises:
        SpecError: when there is no such form, or the name ends in none.
    """
    forms: tuple[Form, ...] = get_args(Form)
    if wanted is not None:
        if path.suffix == ".h" and wanted in ("so", "static", "object"):
            problem = f"the header of a form '{wanted}' would be written over it"
            raise SpecError(str(path), problem, "choose a name that does not end in .h")
        for form in forms:
            if form == wanted:
                return form
        problem = f"expected {', '.join(forms[:-1])} or {forms[-1]}, got '{wanted}'"
        raise SpecError("format", problem, near_name_hint(wanted, forms))
    if path.suffix not in SUFFIXES:
        raise SpecError(
            str(path),
            f"expected a name that ends in .so, .a, .o, .h or in nothing, got '{path.suffix}'",
            "net.so is a shared library, net.a a static one, net.o an object, net an executable, "
            "net.h the header; or say which by the format",
        )
    return SUFFIXES[path.suffix]


def libc_of(form: Form, wanted: str | None = None, *, gpu: bool = False) -> Libc:
    """The C library of a form: musl in programs, which hold it, and glibc in all else.

    Args:
        form: the form.
        wanted: the C library; by default that of the form.
        gpu: whether it is a model for a GPU, whose driver needs glibc.

    Raises:
        SpecError: when there is no such C library, or it has no driver for the GPU.
    """
    if wanted is None:
        return "musl" if form == "exe" and not gpu else "glibc"
    if wanted == "musl" and gpu:
        raise SpecError("libc", "the CUDA driver needs glibc, got 'musl'", "leave it out")
    for libc in get_args(Libc):
        if libc == wanted:
            found: Libc = libc
            return found
    raise SpecError("libc", f"expected glibc or musl, got '{wanted}'")
