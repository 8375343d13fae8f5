"""Compiling CUDA source without CUDA's toolkit: NVIDIA's compiler as a library, from PyPI."""

import ctypes
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from shohin.errors import ArtifactError

_PACKAGES = {"libnvrtc": "nvidia-cuda-nvrtc", "libnvfatbin": "nvidia-nvfatbin"}
_HINT = "pip install 'shohin[cuda]'"
_USE = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU.

    Attributes:
        registers: of a thread.
        shared_bytes: of a block.
        spilled_bytes: that a thread moves between registers and memory for want of registers.
        stack_bytes: of a thread, in memory.
    """

    registers: int
    shared_bytes: int
    spilled_bytes: int
    stack_bytes: int


@dataclass(frozen=True)
class DeviceBinary:
    """Code for GPUs.

    Attributes:
        image: a fat binary: machine code, and PTX for later architectures.
        resources: what each kernel takes, by name.
        cuda: major version of CUDA whose drivers know the machine code.
    """

    image: bytes
    resources: dict[str, Resources]
    cuda: int


def compile_source(source: str, arch: str) -> DeviceBinary:
    """Compile CUDA source.

    Args:
        source: needs no header.
        arch: e.g. ``sm_80``; later ones of other generations compile the PTX when they load it.

    Raises:
        ArtifactError: when the compiler is not installed, or refuses the source.
    """
    machine_code, ptx, log = _Program(source).compile(arch)
    resources = dict(_resources(log))
    return DeviceBinary(_fat_binary(machine_code, ptx, arch), resources, _cuda_version()[0])


def _cuda_version() -> tuple[int, int]:
    """That of the compiler: its machine code runs from the same major version on."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    if _library("libnvrtc").nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
        raise ArtifactError("CUDA compiler", "does not say its version")
    return major.value, minor.value


def _resources(log: str) -> Iterator[tuple[str, Resources]]:
    for found in _USE.finditer(log):
        shared = _SHARED.search(found["rest"])
        yield (
            found["name"],
            Resources(
                int(found["registers"]),
                int(shared[1]) if shared else 0,
                int(found["stores"]) + int(found["loads"]),
                int(found["stack"]),
            ),
        )


class _Program:
    """A source at the compiler."""

    def __init__(self, source: str) -> None:
        self._library = _library("libnvrtc")
        self._handle = ctypes.c_void_p()
        text = source.encode()
        self._call("CreateProgram", ctypes.byref(self._handle), text, b"model.cu", 0, None, None)

    def compile(self, arch: str) -> tuple[bytes, bytes, str]:
        """Machine code, PTX, and what the compiler said."""
        options = [
            f"--gpu-architecture={arch}".encode(),
            b"--std=c++17",
            b"--ptxas-options=-v",
        ]
        try:
            array = (ctypes.c_char_p * len(options))(*options)
            status = self._library.nvrtcCompileProgram(self._handle, len(options), array)
            log = self._get("ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                lines = [line for line in log.splitlines() if "error" in line][:4]
                raise ArtifactError(
                    "CUDA compiler", f"refused the kernels: {' | '.join(lines) or log[:500]}"
                )
            return self._get("CUBIN"), self._get("PTX").rstrip(b"\0"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(self._handle))

    def _get(self, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", self._handle, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", self._handle, text)
        return text.raw

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, f"nvrtc{name}")(*arguments)
        if status:
            raise ArtifactError("CUDA compiler", f"nvrtc{name} failed with status {status}")


def _fat_binary(machine_code: bytes, ptx: bytes, arch: str) -> bytes:
    """Both forms in one image, of which the driver takes what fits the GPU."""
    library, handle = _library("libnvfatbin"), ctypes.c_void_p()
    number = arch.removeprefix("sm_").encode()

    def call(name: str, *arguments: Any) -> None:
        status = getattr(library, f"nvFatbin{name}")(*arguments)
        if status:
            raise ArtifactError("fat binary", f"nvFatbin{name} failed with status {status}")

    options = (ctypes.c_char_p * 1)(b"-64")
    call("Create", ctypes.byref(handle), options, 1)
    try:
        size = ctypes.c_size_t()
        bytes_ = ctypes.c_size_t(len(machine_code))
        call("AddCubin", handle, machine_code, bytes_, number, b"model")
        # PTX is a text, whose end counts.
        text = ptx + b"\0"
        call("AddPTX", handle, text, ctypes.c_size_t(len(text)), number, b"model", None)
        call("Size", handle, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        call("Get", handle, image)
        return image.raw
    finally:
        library.nvFatbinDestroy(ctypes.byref(handle))


@lru_cache(maxsize=4)
def _library(name: str) -> Any:
    """A library of NVIDIA's packages, else the system's.

    Raises:
        ArtifactError: when neither is there.
    """
    for path in [*_packaged(name), f"{name}.so.13", f"{name}.so.12", f"{name}.so"]:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise ArtifactError(
        f"library {name}", f"is not installed; compiling for GPUs needs {_PACKAGES[name]}", _HINT
    )


def _packaged(name: str) -> Sequence[Path]:
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or ()) if spec else []
    return sorted(
        (path for place in places for path in Path(place).glob(f"*/lib/{name}.so.*")), reverse=True
    )
