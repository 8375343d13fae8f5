"""Compiles regions to a shared library and runs them through ctypes."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from shohin.backends.tvm.generic.region import RegionCode, compile_region
from shohin.backends.tvm.objects import emit_object
from shohin.backends.tvm.target import CpuTarget

_ALIGNMENT = 64


class _Function(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.function(*inputs)
        return tuple(result) if isinstance(result, tuple | list) else (result,)


@dataclass(frozen=True)
class Region:
    """A function of tensors as a region, and as what torch makes of it."""

    module: fx.GraphModule
    inputs: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]

    def compile(self) -> RegionCode:
        return compile_region(self.module, [(tuple(t.shape), t.dtype) for t in self.inputs])


def capture(function: Callable[..., Any], *inputs: torch.Tensor) -> Region:
    program = torch.export.export(_Function(function), inputs)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    with torch.no_grad():
        return Region(module, inputs, _Function(function)(*inputs))


def _aligned(shape: Sequence[int], dtype: str, fill: int = 0xA5) -> Any:
    """An aligned array of recognisable rubbish."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.full(size + 2 * _ALIGNMENT, fill, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


class Runner:
    """Regions in one loaded library."""

    def __init__(self, codes: dict[str, RegionCode], folder: Path, target: CpuTarget) -> None:
        self.codes = codes
        functions: dict[str, Any] = {}
        self.symbols: dict[int, str] = {}
        for code in codes.values():
            for call in code.calls:
                symbol = self.symbols.setdefault(id(call.function), f"k{len(self.symbols)}")
                functions[symbol] = call.function
        emit_object(functions, target, folder / "kernels.o")
        self.object_bytes = (folder / "kernels.o").read_bytes()
        command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-target"]
        command += ["x86_64-linux-gnu.2.17", str(folder / "kernels.o"), "-lm", "-o"]
        subprocess.run([*command, str(folder / "kernels.so")], check=True)
        self.library = ctypes.CDLL(str(folder / "kernels.so"), mode=os.RTLD_NOW)

    def prepare(self, name: str, region: Region) -> tuple[dict[str, Any], list[Any]]:
        """Arrays by name, and calls ready to make."""
        code = self.codes[name]
        arrays: dict[str, Any] = {}
        for position, tensor in enumerate(region.inputs):
            value = tensor.detach().contiguous().numpy()
            arrays[f"in{position}"] = _aligned(value.shape, str(value.dtype))
            arrays[f"in{position}"][...] = value
        for constant, value in code.constants.items():
            arrays[constant] = _aligned(value.shape, str(value.dtype))
            arrays[constant][...] = value
        for temporary, (shape, dtype) in code.temporaries.items():
            arrays[temporary] = _aligned(shape, dtype)
        for position, tensor in enumerate(region.expected):
            dtype = str(tensor.dtype).removeprefix("torch.")
            arrays[f"out{position}"] = _aligned(tuple(tensor.shape), dtype)
        calls = []
        for call in code.calls:
            pointers = [ctypes.c_void_p(arrays[a].ctypes.data) for a in call.arguments]
            calls.append((self.library[self.symbols[id(call.function)]], pointers, call.extent))
        return arrays, calls

    def run(self, name: str, region: Region, pieces: int) -> list[Any]:
        """The outputs, every call made as so many ranges, the last range first."""
        arrays, calls = self.prepare(name, region)
        for function, pointers, extent in calls:
            bounds = [extent * i // pieces for i in range(pieces + 1)]
            for begin, end in reversed(list(pairwise(bounds))):
                assert function(*pointers, ctypes.c_int32(begin), ctypes.c_int32(end)) == 0
        for position, tensor in enumerate(region.inputs):
            np.testing.assert_array_equal(arrays[f"in{position}"], tensor.detach().numpy())
        pairs = zip(self.codes[name].outputs, region.expected, strict=True)
        return [arrays[output].reshape(tuple(tensor.shape)) for output, tensor in pairs]


@pytest.fixture(scope="session")
def capture_region() -> Callable[..., Region]:
    return capture


@pytest.fixture(scope="session")
def make_runner(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Runner]:
    def make(codes: dict[str, RegionCode], target: CpuTarget | None = None) -> Runner:
        return Runner(codes, tmp_path_factory.mktemp("generic"), target or CpuTarget())

    return make
