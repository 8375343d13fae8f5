"""Checks of output files before the work whose result they are to hold."""

import os
from pathlib import Path

from shohin.errors import ArtifactError, SpecError

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


def check_form(path: Path) -> None:
    """Refuse a name whose ending says no form of a compiled model.

    Raises:
        SpecError: naming the endings there are.
    """
    if path.suffix not in (".so", ".a", ".o", ".shohin", ""):
        problem = f"expected a name that ends in .so, .a, .o or nothing, got '{path.suffix}'"
        hint = "net.so is a shared library, net.a a static one, net.o an object, net an executable"
        raise SpecError(str(path), problem, hint)
