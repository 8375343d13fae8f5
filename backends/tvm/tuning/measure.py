"""Measuring variants of kernels on this machine."""

import ctypes
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.link import link_kernels
from shohin.backends.tvm.objects import emit_object
from shohin.backends.tvm.target import CpuTarget

_BUDGET = 0.012
_LEAST_ROUNDS = 3


def measure_kernels(
    kernels: Sequence[Kernel], target: CpuTarget, compiled: Callable[[], None] = lambda: None
) -> list[float]:
    """Milliseconds of each kernel on one thread, the least of a few interleaved runs.

    Args:
        kernels: variants to compare, of any number of problems; those with equal parameters
            beside each other share their arrays.
        target: processor to compile for; it must be one this machine can run.
        compiled: called when the code is there and measuring begins.
    """
    with tempfile.TemporaryDirectory(prefix="shohin-tune-") as name:
        folder = Path(name)
        functions = {f"kernel_{i}": kernel.build() for i, kernel in enumerate(kernels)}
        emit_object(functions, target, folder / "kernels.o")
        library = folder / "kernels.so"
        link_kernels(folder, library)
        loaded = ctypes.CDLL(str(library))
        compiled()
        runs = [_runner(loaded, i, kernel) for i, kernel in enumerate(kernels)]
        return [_least(run) for run in runs]


def _runner(library: Any, index: int, kernel: Kernel) -> Callable[[], float]:
    function = getattr(library, f"kernel_{index}")

    def run() -> float:
        start = time.perf_counter()
        function(*pointers, 0, kernel.extent)
        return time.perf_counter() - start

    arrays = [_random(p.shape, p.dtype) for p in kernel.parameters()]
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    run.__dict__["arrays"] = arrays
    return run


def _random(shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers of ordinary size on a boundary that kernels may assume."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)
    array[:] = 0.5
    return array


def _least(run: Callable[[], float]) -> float:
    run()
    times = [run()]
    spent = times[0]
    while len(times) < _LEAST_ROUNDS or (spent < _BUDGET and len(times) < 200):
        times.append(run())
        spent += times[-1]
    return min(times) * 1e3
