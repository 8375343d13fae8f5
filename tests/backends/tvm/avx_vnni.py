"""Runs code for processors with AVX-VNNI on those that lack it, by `avx_vnni.c`."""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

from shohin.backends.tvm import target
from shohin.backends.tvm.target import host_runs

ARCH = "x86-64-v3-vnni"


def why_not(arch: str) -> str:
    """Why code for a processor cannot run here, or an empty text where it can from now on."""
    problem = host_runs(arch)
    if arch != ARCH or not problem or host_runs("x86-64-v3") or sys.platform != "linux":
        return problem
    carried_out()
    return ""


def allow(monkeypatch: pytest.MonkeyPatch, arch: str) -> str:
    """The same, for binaries, which look at the processor themselves."""
    if problem := why_not(arch):
        return problem
    if arch == ARCH and host_runs(arch):
        target.CpuTarget().resolved()  # While the host still is what it is.
        flags = target._host_flags() | {"avx_vnni"}
        monkeypatch.setattr(target, "_host_flags", lambda: flags)
        monkeypatch.setattr(target.CpuTarget, "needs", lambda self: ("avx2", "fma"))
    return ""


def carried_out() -> int:
    """Instructions carried out so far."""
    return int(_library().avx_vnni_count())


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    path = Path(folder) / "avx_vnni.so"
    source = Path(__file__).with_suffix(".c")
    command = [sys.executable, "-m", "ziglang", "cc", "-O2", "-shared", "-fPIC", "-Wall", "-Werror"]
    subprocess.run([*command, "-o", path, source], check=True)
    library = ctypes.CDLL(str(path))
    shutil.rmtree(folder)
    library.avx_vnni_count.restype = ctypes.c_ulong
    if library.avx_vnni_install():
        raise OSError("no handler of SIGILL could be installed")
    return library
