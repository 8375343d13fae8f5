"""The limits of this machine, measured: fused multiply-adds a second, and bytes read a second."""

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_SOURCE = r"""
#include <stddef.h>
typedef float vec __attribute__((vector_size(64), aligned(64)));
/* Independent sums enough to fill the units. */
void fma_loop(long rounds, float *sink) {
    vec sums[12], x = (vec){} + 1.0001f, y = (vec){} + 1e-7f;
    for (int i = 0; i < 12; ++i) sums[i] = (vec){} + (float)i;
    for (long r = 0; r < rounds; ++r) {
#pragma clang loop unroll(full)
        for (int i = 0; i < 12; ++i) sums[i] = sums[i] * x + y;
    }
    for (int i = 0; i < 12; ++i) sink[i] = sums[i][0];
}
/* Reads an array once. */
void read_loop(const float *data, size_t vectors, float *sink) {
    const vec *in = (const vec *)data;
    vec sums[8] = {};
    for (size_t i = 0; i + 8 <= vectors; i += 8) {
#pragma clang loop unroll(full)
        for (int k = 0; k < 8; ++k) sums[k] += in[i + k];
    }
    for (int i = 0; i < 8; ++i) sink[i] = sums[i][0];
}
"""


@dataclass(frozen=True)
class Limits:
    """What the machine can do with so many threads.

    Attributes:
        threads: number of threads.
        gflops: float32 operations a second, in 1e9; a fused multiply-add counts as two.
        gigabytes: bytes read from memory a second, in 1e9.
    """

    threads: int
    gflops: float
    gigabytes: float


class LimitLoops:
    """The two loops on so many threads at once, to be timed beside what they are a limit for.

    Attributes:
        operations: floating point operations of `run_fma`.
        bytes: bytes read by `run_read`.
    """

    def __init__(self, threads: int, rounds: int = 400_000, floats: int = 1 << 25) -> None:
        import numpy as np

        self._folder = tempfile.TemporaryDirectory()
        self._library = _build(Path(self._folder.name))
        self._arrays = [np.ones(floats, np.float32) for _ in range(threads)]
        self._sink = np.zeros((threads, 16), np.float32)
        self._pool = ThreadPoolExecutor(threads)
        self._threads = range(threads)
        self._rounds = rounds
        self.operations = 2 * 16 * 12 * rounds * threads
        self.bytes = 64 * self._vectors() * threads

    def _vectors(self) -> int:
        return int(self._arrays[0].size - 16) // 16 // 8 * 8

    def run_fma(self) -> None:
        """Fused multiply-adds in registers."""
        list(self._pool.map(self._fma, self._threads))

    def run_read(self) -> None:
        """Read every thread's array once."""
        list(self._pool.map(self._read, self._threads))

    def _fma(self, thread: int) -> None:
        self._library.fma_loop(self._rounds, self._sink[thread].ctypes.data)

    def _read(self, thread: int) -> None:
        array = self._arrays[thread]
        start = (-array.ctypes.data) % 64 // 4
        pointer = array[start:].ctypes.data
        self._library.read_loop(pointer, self._vectors(), self._sink[thread].ctypes.data)


def measure_limits(threads: int, rounds: int = 15) -> Limits:
    """The best of a few rounds on so many threads at once."""
    loops = LimitLoops(threads)
    flops = max(loops.operations / _seconds(loops.run_fma) for _ in range(rounds))
    rate = max(loops.bytes / _seconds(loops.run_read) for _ in range(rounds))
    return Limits(threads, flops / 1e9, rate / 1e9)


def _seconds(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _build(folder: Path) -> ctypes.CDLL:
    (folder / "limits.c").write_text(_SOURCE)
    command = [
        sys.executable, "-m", "ziglang", "cc", "-O2", "-mcpu=native", "-ffp-contract=fast",
        "-shared", "-fPIC", "-o", "limits.so", "limits.c",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "limits.so"))
    library.fma_loop.argtypes = [ctypes.c_long, ctypes.c_void_p]
    library.read_loop.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library


if __name__ == "__main__":
    for count in (1, 2):
        print(measure_limits(count))
