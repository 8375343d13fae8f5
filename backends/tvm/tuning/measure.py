"""Measuring variants of kernels on this machine."""

import ctypes
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tvm.ir import PrimType

from shohin.backends.tvm.generic.expressions import shape_of
from shohin.backends.tvm.generic.schedule import RangedFunction
from shohin.backends.tvm.kernels.emit import Array, Kernel
from shohin.backends.tvm.link import link_kernels
from shohin.backends.tvm.objects import emit_object
from shohin.backends.tvm.processor import Processor

Sample = Mapping[int, Array]

_BUDGET = 0.012
_LEAST_ROUNDS = 5
_MOST_ROUNDS = 100
_SECOND_LEVEL = 1 << 20
_LAST_LEVEL = 1 << 24
"""Floats that are more than a cache of that level holds."""


def measure_kernels(
    kernels: Sequence[Kernel], target: Processor, compiled: Callable[[], None] = lambda: None
) -> list[float]:
    """Milliseconds of each kernel on one thread, the least of a few interleaved runs.

    Args:
        kernels: variants to compare, of any number of problems; those with equal parameters
            beside each other share their arrays.
        target: processor to compile for; it must be one this machine can run.
        compiled: called when the code is there and measuring begins.
    """
    functions = [RangedFunction(kernel.build(), kernel.extent) for kernel in kernels]
    samples = [_sample(kernel) for kernel in kernels]
    return measure_functions(functions, target, samples=samples, compiled=compiled)


def _sample(kernel: Kernel) -> Sample:
    """The arrays that a kernel brings, by the place of their parameter."""
    given = kernel.sample()
    return {i: given[p.name] for i, p in enumerate(kernel.parameters()) if p.name in given}


def measure_functions(
    functions: Sequence[RangedFunction],
    target: Processor,
    *,
    samples: Sequence[Sample] = (),
    hopeless: float = math.inf,
    compiled: Callable[[], None] = lambda: None,
) -> list[float]:
    """Milliseconds of each function on one thread, the least of a few runs.

    Args:
        functions: what to compare; those with equal parameters beside each other share their
            arrays.
        target: processor to compile for; it must be one this machine can run.
        samples: for each function the arrays that must hold certain numbers, by their place.
        hopeless: milliseconds from which on the first run of a function is its last.
        compiled: called when the code is there and measuring begins.
    """
    with _compiled(functions, target) as library:
        compiled()
        return _times(library, functions, samples or [{}] * len(functions), hopeless)


def compute(
    functions: Sequence[tuple[RangedFunction, Sequence[str]]], output: str, target: Processor
) -> list[Any]:
    """What each function computes from the same random numbers, as flat arrays.

    Args:
        functions: each with the names of its arrays; arrays of one name hold the same numbers.
        output: the array that is written.
        target: processor to compile for; it must be one this machine can run.
    """
    generator = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    results = []
    with _compiled([function for function, _ in functions], target) as library:
        for index, (ranged, names) in enumerate(functions):
            arrays = dict(zip(names, _array_shapes(ranged.function), strict=True))
            for name in sorted(arrays.keys() - inputs.keys() - {output}):
                inputs[name] = _filled(*arrays[name])
                _randomise(inputs[name], generator)
            written = _filled(*arrays[output])
            used = [written if name == output else inputs[name] for name in names]
            _runner(getattr(library, f"kernel_{index}"), used, ranged.extent)()
            results.append(written)
    return results


@contextmanager
def _compiled(functions: Sequence[RangedFunction], target: Processor) -> Iterator[Any]:
    """A loaded library of the functions ``kernel_0`` and so on."""
    with tempfile.TemporaryDirectory(prefix="shohin-tune-") as name:
        folder = Path(name)
        built = {f"kernel_{i}": ranged.function for i, ranged in enumerate(functions)}
        emit_object(built, target, folder / "kernels.o")
        library = folder / "kernels.so"
        link_kernels(folder, library)
        yield ctypes.CDLL(str(library))


def _times(
    library: Any, functions: Sequence[RangedFunction], samples: Sequence[Sample], hopeless: float
) -> list[float]:
    times: list[float] = []
    shapes: list[tuple[tuple[int, ...], str]] = []
    arrays: list[Any] = []
    for index, (ranged, sample) in enumerate(zip(functions, samples, strict=True)):
        if _array_shapes(ranged.function) != shapes or sample or not index:
            shapes = _array_shapes(ranged.function)
            arrays = [_filled(shape, dtype) for shape, dtype in shapes]
        for place, numbers in sample.items():
            arrays[place][:] = numbers.reshape(-1)
        run = _runner(getattr(library, f"kernel_{index}"), arrays, ranged.extent)
        size = sum(array.nbytes for array in arrays)
        times.append(_least(run, hopeless, size))
    return times


def _array_shapes(function: Any) -> list[tuple[tuple[int, ...], str]]:
    arrays = [p for p in function.params if not isinstance(p.ty, PrimType)]
    return [(shape_of(array), str(array.dtype)) for array in arrays]


def _runner(function: Any, arrays: Sequence[Any], extent: int) -> Callable[[], float]:
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]

    def run() -> float:
        start = time.perf_counter()
        function(*pointers, 0, extent)
        return time.perf_counter() - start

    return run


def _filled(shape: tuple[int, ...], dtype: str) -> Any:
    """Numbers of ordinary size on a boundary that kernels may assume."""
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + count * np.dtype(dtype).itemsize].view(dtype)
    array[:] = 0.5
    return array


def _randomise(array: Any, generator: np.random.Generator) -> None:
    if array.dtype.kind == "f":
        array[:] = generator.normal(scale=2, size=array.size)
    else:
        array[:] = generator.integers(0, 8, array.size)


def _least(run: Callable[[], float], hopeless: float, size: int) -> float:
    """Milliseconds of the fastest run.

    Between runs the caches are filled with something else: in a network the weights of a kernel
    have been pushed out by those of the others, and a tile that reads them more than once from
    further away must not look as good as it does in a loop.

    Args:
        run: runs once and gives seconds.
        hopeless: milliseconds from which on the first run is the last.
        size: bytes that a run touches; large ones come from memory, small ones from a large cache.
    """
    first = run() * 1e3
    if first >= hopeless:
        return first
    filler = np.zeros(_LAST_LEVEL if size > 4 * _SECOND_LEVEL else _SECOND_LEVEL, np.float32)
    times: list[float] = []
    while len(times) < _LEAST_ROUNDS or (sum(times) < _BUDGET and len(times) < _MOST_ROUNDS):
        np.add(filler, 1.0, out=filler)
        times.append(run())
    return min(times) * 1e3
