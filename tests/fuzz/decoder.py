"""The decoder of coded weights, built on its own."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.link import RUNTIME
from shohin.ir.container.varints import encode_varint

_SOURCES = [str(Path(__file__).with_name("decode.c")), str(RUNTIME / "shohin_decode.c")]
_FLAGS = ["-std=gnu11", "-DSHOHIN_NAME=fuzz", f"-I{RUNTIME}", "-pthread"]
_FLAGS += ["-ftrivial-auto-var-init=pattern"]  # What is read before it is set, shows every time.
ZIG = [sys.executable, "-m", "ziglang", "cc", "-O2", "-Wall", "-Wextra", "-Werror"]

OK, DAMAGED = 0, 5


def build(compiler: list[str], output: Path) -> None:
    """Build the harness, a program or with ``-shared`` a library.

    Raises:
        CalledProcessError: with the compiler's messages.
    """
    command = [*compiler, *_FLAGS, *_SOURCES, "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True, text=True)


class Decoder:
    """The decoder as a function.

    Args:
        folder: where to build it.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "decode.so"
        build([*ZIG, "-shared", "-fPIC"], library)
        self._decode = ctypes.CDLL(str(library)).decode
        self._decode.argtypes = [
            ctypes.c_char_p,
            ctypes.c_size_t,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int32,
        ]

    def decode(self, coded: bytes, size: int, threads: int = 1) -> tuple[int, NDArray[np.uint8]]:
        """The status, and so many bytes of weights."""
        weights = np.zeros(size + 64, np.uint8)
        start = -weights.ctypes.data % 64
        place = weights[start : start + size]
        return self._decode(coded, len(coded), place.ctypes.data, size, threads), place


def framed(*jobs: bytes) -> bytes:
    """Coded weights of so many jobs."""
    return b"".join(encode_varint(len(job)) + job for job in jobs)
