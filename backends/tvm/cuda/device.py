"""The GPU of this machine, if it has one."""

import ctypes
from functools import lru_cache

from shohin.backends.tvm.cuda.target import capability_of

_MAJOR, _MINOR = 75, 76
"""The driver's numbers for the two parts of the compute capability."""


def why_not(arch: str) -> str:
    """Why this machine cannot run what is compiled for a generation; empty where it can."""
    found = _capability()
    if isinstance(found, str):
        return found
    return f"the GPU here is sm_{found}" if found < capability_of(arch) else ""


@lru_cache(maxsize=1)
def _capability() -> int | str:
    """Ten times the compute capability of the first GPU, or why there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver"
    count, parts = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return "the CUDA driver shows no GPU"
    for part, which in zip(parts, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(part), which, 0):
            return "the CUDA driver does not say what the GPU is"
    return 10 * parts[0].value + parts[1].value
