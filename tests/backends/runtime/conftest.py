"""Makes the helpers beside the tests importable, and skips where binaries cannot run."""

import ctypes
import platform
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stub_models import FLAGS, GATE, GLIBC, MODEL, PARTS, define, zig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder on machines that cannot run what they build."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return
    here = str(Path(__file__).parent)
    for item in items:
        if str(item.path).startswith(here):
            reason = "runs the binaries it builds, which are for x86_64 Linux"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of this folder build what they share."""
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="session")
def library(folder: Path) -> ctypes.CDLL:
    """Three models in one shared library."""
    objects: list[Path] = []
    for name, text in (("alpha", MODEL), ("beta", MODEL), ("gate", GATE)):
        source = folder / f"{name}.c"
        source.write_text(text)
        for number, part in enumerate((source, *PARTS)):
            objects.append(folder / f"{name}{number}.o")
            zig("cc", *GLIBC, *FLAGS, *define(name), "-fPIC", "-c", part, "-o", objects[-1])
    zig("cc", *GLIBC, "-shared", "-pthread", *objects, "-o", folder / "models.so")
    return ctypes.CDLL(str(folder / "models.so"))
