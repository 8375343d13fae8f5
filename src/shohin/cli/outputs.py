"""Checks of files before the work that reads them, or whose result they are to hold."""

import os
from pathlib import Path

from shohin.errors import ArtifactError

_ELF_ENTRY = 24
"""Where the header of an ELF file has the address that a program starts at."""
_HINT = "choose a folder that exists and that you may write to"


def check_output(path: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        ArtifactError: when its folder is missing or read-only, or it is a folder itself.
    """
    if path is None:
        return
    if path.is_dir():
        raise ArtifactError(str(path), "cannot be written: is a directory", _HINT)
    if not path.parent.is_dir():
        raise ArtifactError(
            str(path), f"cannot be written: there is no folder {path.parent}", _HINT
        )
    if not os.access(path.parent, os.W_OK):
        raise ArtifactError(str(path), "cannot be written: permission denied", _HINT)


def check_form(path: Path, form: str | None, libc: str | None) -> None:
    """Refuse a form of a compiled model, or a C library, that there is not.

    Args:
        path: the file, whose name may end in the form.
        form: what is asked for otherwise.
        libc: the C library; None where it does not matter.

    Raises:
        SpecError: naming what there is.
    """
    from shohin.backends.tvm.forms import form_of, libc_of

    if path.suffix != ".shohin" or form is not None:
        libc_of(form_of(path, form), libc)


def check_library(file: str) -> None:
    """Refuse a form of a compiled model that only a linker can read.

    Raises:
        ArtifactError: when the name is that of a static library or an object.
    """
    if file.endswith((".a", ".o")):
        problem = "static libraries and objects cannot be loaded"
        raise ArtifactError(file, problem, "compile to .so, e.g. -o net.so, and use that")


def is_executable(file: str) -> bool:
    """Whether a file is a program of its own: by its name without an ending, or by its header.

    Shared libraries are ELF files as well, of any name, but have no address to start at.
    """
    path = Path(file)
    if not path.is_file():
        return False
    if not path.suffix:
        return True
    with path.open("rb") as opened:
        header = opened.read(_ELF_ENTRY + 8)
    size = 8 if header[4:5] == b"\x02" else 4
    return header.startswith(b"\x7fELF") and any(header[_ELF_ENTRY : _ELF_ENTRY + size])


def check_no_executable(file: str) -> None:
    """Refuse a compiled model that is a program of its own.

    Raises:
        ArtifactError: when the file is an executable that shohin made, or no file of shohin's;
            says so when this machine cannot run it either.
    """
    if is_executable(file):
        from shohin.backends.tvm.manifest import info_of
        from shohin.backends.tvm.target import host_runs
        from shohin.backends.tvm.trailer import read_trailer

        path = Path(file)
        info, _ = info_of(read_trailer(path), file)
        processor = info.tools.get("processor", "")
        missing = host_runs(processor)
        if missing:
            problem = f"is a program of its own, compiled for {processor}; {missing}"
            raise ArtifactError(file, problem, "copy it to the machine it is for and run it there")
        command = file if path.is_absolute() else f"./{file.removeprefix('./')}"
        problem = "is a program of its own and cannot be loaded"
        raise ArtifactError(file, problem, f"run it itself: {command} x.npy")
