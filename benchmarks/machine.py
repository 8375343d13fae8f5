"""The limits of this machine, measured: fused multiply-adds a second, and bytes read a second."""

import ctypes
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

_SOURCE = r"""
#include <stddef.h>
#include <time.h>
typedef float vec __attribute__((vector_size(64), aligned(64)));
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
/* Independent sums enough to fill the units; gives operations a second. */
double fma_rate(long rounds, float *sink) {
    vec sums[12], x = (vec){} + 1.0001f, y = (vec){} + 1e-7f;
    for (int i = 0; i < 12; ++i) sums[i] = (vec){} + (float)i;
    double start = now();
    for (long r = 0; r < rounds; ++r) {
#pragma clang loop unroll(full)
        for (int i = 0; i < 12; ++i) sums[i] = sums[i] * x + y;
    }
    double seconds = now() - start;
    for (int i = 0; i < 12; ++i) sink[i] = sums[i][0];
    return 2.0 * 16 * 12 * (double)rounds / seconds;
}
/* Reads an array once; gives bytes a second. */
double read_rate(const float *data, size_t vectors, float *sink) {
    const vec *in = (const vec *)data;
    vec sums[8] = {};
    double start = now();
    for (size_t i = 0; i + 8 <= vectors; i += 8) {
#pragma clang loop unroll(full)
        for (int k = 0; k < 8; ++k) sums[k] += in[i + k];
    }
    double seconds = now() - start;
    for (int i = 0; i < 8; ++i) sink[i] = sums[i][0];
    return 64.0 * (double)vectors / seconds;
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


def measure_limits(threads: int, rounds: int = 7) -> Limits:
    """The best of a few rounds on so many threads at once."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        library = _build(Path(folder))
        arrays = [np.ones(1 << 26, np.float32) for _ in range(threads)]
        sink = np.zeros((threads, 16), np.float32)

        def fma(thread: int) -> float:
            return float(library.fma_rate(4_000_000, sink[thread].ctypes.data))

        def read(thread: int) -> float:
            array = arrays[thread]
            start = (-array.ctypes.data) % 64 // 4
            pointer = array[start:].ctypes.data
            return float(
                library.read_rate(pointer, (array.size - 16) // 16, sink[thread].ctypes.data)
            )

        with ThreadPoolExecutor(threads) as pool:
            flops = max(sum(pool.map(fma, range(threads))) for _ in range(rounds))
            rate = max(sum(pool.map(read, range(threads))) for _ in range(rounds))
    return Limits(threads, flops / 1e9, rate / 1e9)


def _build(folder: Path) -> ctypes.CDLL:
    (folder / "limits.c").write_text(_SOURCE)
    command = [
        sys.executable, "-m", "ziglang", "cc", "-O2", "-mcpu=native", "-ffp-contract=fast",
        "-shared", "-fPIC", "-o", "limits.so", "limits.c",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "limits.so"))
    library.fma_rate.restype = library.read_rate.restype = ctypes.c_double
    library.fma_rate.argtypes = [ctypes.c_long, ctypes.c_void_p]
    library.read_rate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library


if __name__ == "__main__":
    for count in (1, 2):
        print(measure_limits(count))
