"""Runs a compiled model on one input, with nothing but Python's standard library.

    python main.py ./net.so INPUT.f32 [THREADS]

On a machine that has shohin, `shohin.load_binary("net.so")` does all of this. The model has one
float32 input and one float32 output.
"""

import ctypes
import sys
from pathlib import Path


class TensorInfo(ctypes.Structure):
    """``shohin_tensor_info``."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("bytes", ctypes.c_size_t),
    )


class Info(ctypes.Structure):
    """The first fields of ``shohin_info``."""

    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
        ("content_hash", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("inputs", ctypes.POINTER(TensorInfo)),
        ("outputs", ctypes.POINTER(TensorInfo)),
    )


class Net:
    """A model in a shared library.

    Args:
        path: the library.
        threads: to run on.
    """

    def __init__(self, path: str, threads: int) -> None:
        self._library = library = ctypes.CDLL(path)
        library.net_info.restype = ctypes.POINTER(Info)
        library.net_last_error.restype = ctypes.c_char_p
        library.net_destroy.argtypes = [ctypes.c_void_p]
        self.info = library.net_info().contents
        self._instance = ctypes.c_void_p()
        self._check(library.net_create(threads, ctypes.byref(self._instance)))

    def __del__(self) -> None:
        self._library.net_destroy(self._instance)

    def run(self, content: bytes) -> list[float]:
        """The output for an input's bytes."""
        output = (ctypes.c_float * (self.info.outputs[0].bytes // 4))()
        inputs = (ctypes.c_char_p * 1)(content)
        outputs = (ctypes.c_void_p * 1)(ctypes.addressof(output))
        sizes = [(ctypes.c_size_t * 1)(size) for size in (len(content), ctypes.sizeof(output))]
        run = self._library.net_run_sized
        self._check(run(self._instance, inputs, sizes[0], outputs, sizes[1]))
        return list(output)

    def _check(self, status: int) -> None:
        if status:
            raise SystemExit(f"main: {self._library.net_last_error().decode()}")


def main() -> None:
    """Print the index of the largest output, and the output."""
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: main.py ./net.so INPUT.f32 [THREADS]")
    library, image, *threads = sys.argv[1:]
    output = Net(library, int(threads[0]) if threads else 1).run(Path(image).read_bytes())
    best = max(range(len(output)), key=output.__getitem__)
    print(best, f"{output[best]:.9g}")


if __name__ == "__main__":
    main()
