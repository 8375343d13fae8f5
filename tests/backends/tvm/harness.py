"""Runs kernels on their own, between guards, and says how exact their results must be.

Every array lies in memory of its own: an inaccessible page, a pattern, the array, the rest of its
last 64 bytes in the same pattern, an inaccessible page. A kernel that writes next to an array
changes the pattern (a NaN as float32, so that reading it shows in the result as well), one that
reads or writes further away crashes.
"""

import ctypes
import math
import mmap
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shohin.backends.tvm.kernels.emit import LANES, Kernel
from shohin.backends.tvm.kernels.epilogue import OperandKind, Step
from shohin.backends.tvm.objects import emit_object
from shohin.backends.tvm.target import CpuTarget

Array: TypeAlias = NDArray[Any]

EPS = float(np.finfo(np.float32).eps)
"""Distance of 1 to the next float32: twice the relative error of one rounding."""

_ALIGNMENT = 64
_PAGE = mmap.PAGESIZE
_CANARY = 0xFFC0DEAD
"""A quiet NaN that no computation makes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """A 64-byte aligned array whose surroundings are watched.

    Args:
        shape: sizes.
        dtype: element type.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        padded = -(-size // _ALIGNMENT) * _ALIGNMENT
        inner = -(-(padded + _ALIGNMENT) // _PAGE) * _PAGE
        self._memory = mmap.mmap(-1, inner + 2 * _PAGE)
        everything = np.frombuffer(self._memory, dtype=np.uint32)
        everything[:] = _CANARY
        base = everything.ctypes.data
        for page in (base, base + _PAGE + inner):
            if _libc.mprotect(page, _PAGE, 0):
                raise OSError(ctypes.get_errno(), "mprotect failed")
        start = _PAGE + inner - padded
        raw = np.frombuffer(self._memory, dtype=np.uint8, count=size, offset=start)
        self.array: Array = raw.view(kind).reshape(shape)
        self.address = base + start
        self._before = np.frombuffer(
            self._memory, dtype=np.uint32, count=(start - _PAGE) // 4, offset=_PAGE
        )
        self._after = np.frombuffer(
            self._memory, dtype=np.uint8, count=padded - size, offset=start + size
        )
        self._pattern = self._after.copy()

    def check(self, name: str) -> None:
        """Fail if something next to the array was written."""
        assert (self._before == _CANARY).all(), f"wrote before {name}"
        assert (self._after == self._pattern).all(), f"wrote behind {name}"


class KernelLibrary:
    """Many kernels compiled to one shared library.

    Args:
        kernels: what to compile; equal ones once.
        target: what for.
    """

    def __init__(self, kernels: Iterable[Kernel], target: CpuTarget | None = None) -> None:
        self._symbols = {kernel: f"k{i}" for i, kernel in enumerate(dict.fromkeys(kernels))}
        self._library = link_functions(
            {symbol: kernel.build() for kernel, symbol in self._symbols.items()},
            target or CpuTarget(),
        )

    def run(self, kernel: Kernel, inputs: Sequence[Array]) -> Array:
        """Run a kernel over everything at once and in three parts, which must agree bit for bit.

        Args:
            kernel: one of the library's.
            inputs: an array for each parameter but the last.

        Returns:
            The output, with NaN in float elements that were not written.
        """
        function = self._library[self._symbols[kernel]]
        *parameters, result = kernel.parameters()
        given = []
        for parameter, array in zip(parameters, inputs, strict=True):
            assert array.dtype == parameter.dtype, f"{parameter.name} is {array.dtype}"
            assert array.size == math.prod(parameter.shape), f"{parameter.name}: {array.shape}"
            guarded = Guarded(parameter.shape, parameter.dtype)
            guarded.array[...] = array.reshape(parameter.shape)
            given.append(guarded)
        whole, parts = (Guarded(result.shape, result.dtype) for _ in range(2))
        extent = kernel.extent
        cuts = [0, extent // 3, extent - extent // 3, extent]
        _call(function, [*given, whole], 0, extent)
        for begin, end in pairwise(cuts):
            _call(function, [*given, parts], begin, end)
        names = [*(p.name for p in parameters), f"{result.name} (whole)", f"{result.name} (parts)"]
        for name, guarded in zip(names, [*given, whole, parts], strict=True):
            guarded.check(name)
        for parameter, guarded, array in zip(parameters, given, inputs, strict=True):
            same = guarded.array.tobytes() == array.tobytes()
            assert same, f"wrote to the input {parameter.name}"
        assert whole.array.tobytes() == parts.array.tobytes(), "depends on the partition"
        return whole.array.copy()


def link_functions(functions: dict[str, Any], target: CpuTarget) -> ctypes.CDLL:
    """Compile TIR functions to a shared library and load it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        emit_object(functions, target, folder / "kernels.o")
        zig(["cc", "-shared", "kernels.o", "-o", "kernels.so", "-lm"], folder)
        return ctypes.CDLL(str(folder / "kernels.so"))


def zig(arguments: list[str], folder: Path) -> None:
    """Run the C toolchain for a glibc target in a folder; the first of the arguments is ``cc``."""
    tool, *rest = arguments
    command = [sys.executable, "-m", "ziglang", tool, "-target", "x86_64-linux-gnu.2.17", *rest]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _call(function: Any, arrays: list[Guarded], begin: int, end: int) -> None:
    pointers = [ctypes.c_void_p(guarded.address) for guarded in arrays]
    assert function(*pointers, ctypes.c_int32(begin), ctypes.c_int32(end)) == 0


def to_blocked(image: Array) -> Array:
    """``[N, C, H, W]`` to ``[N, C/16, H, W, 16]``, zeros where channels are missing."""
    batch, channels, height, width = image.shape
    count = -(-channels // LANES)
    full = np.zeros((batch, count * LANES, height, width), image.dtype)
    full[:, :channels] = image
    split = full.reshape(batch, count, LANES, height, width)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2))


def to_plain(blocked: Array, channels: int) -> Array:
    """``[N, C/16, H, W, 16]`` to ``[N, C, H, W]``."""
    batch, count, height, width, _ = blocked.shape
    image = blocked.transpose(0, 1, 4, 2, 3).reshape(batch, count * LANES, height, width)
    return np.ascontiguousarray(image[:, :channels])


@dataclass(frozen=True)
class Bounded:
    """Exact numbers, and how far float32 results may be from them, element by element."""

    exact: Tensor
    bound: Tensor

    def check(self, found: Array) -> None:
        """Fail, naming the worst element, unless every element is within its bound."""
        difference = (torch.from_numpy(np.ascontiguousarray(found)).double() - self.exact).abs()
        excess = torch.where(difference.isnan(), torch.inf, difference - self.bound)
        worst = int(excess.argmax())
        place = tuple(int(i) for i in np.unravel_index(worst, found.shape))
        assert excess.max() <= 0, (
            f"at {place}: got {found.reshape(-1)[worst]}, "
            f"expected {float(self.exact.reshape(-1)[worst])} "
            f"within {float(self.bound.reshape(-1)[worst])}"
        )


def sum_of_products(exact: Tensor, magnitude: Tensor, terms: int) -> Bounded:
    """What a float32 sum of products may be, in whatever order it is added up.

    The error of a sum of n rounded products is at most ``n * eps / 2`` times the sum of their
    magnitudes (Higham 2002, section 3.1); the bias, the scale and the store are four roundings.

    Args:
        exact: the sums in float64.
        magnitude: sums of the products' magnitudes.
        terms: how many products are added.
    """
    return Bounded(exact, (terms + 4) * EPS / 2 * magnitude)


_SLOPES = {"gelu": 1.13, "gelu-tanh": 1.13, "silu": 1.1, "hard-swish": 1.5}
"""Largest slope of the functions that have one above 1."""

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "hard-sigmoid": functional.hardsigmoid,
    "hard-swish": functional.hardswish,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "gelu-tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "negate": torch.neg,
    "abs": torch.abs,
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "subtract-from": lambda x, y: y - x,
    "multiply": torch.mul,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}

UNARY_STEPS = (
    *(Step(kind) for kind in _UNARY),
    Step("clamp", (-0.5, 0.75)),
    Step("leaky-relu", (0.1,)),
    Step("elu", (1.0,)),
)
"""Every kind of step without an operand."""

SCALAR_STEPS = tuple(Step(f"{kind}-scalar", (0.625,)) for kind in _BINARY)
"""Every kind of step with a number."""

_OPERANDS: tuple[OperandKind, ...] = ("full", "channel")
OPERAND_STEPS = tuple(Step(kind, operand=operand) for kind in _BINARY for operand in _OPERANDS)
"""Every kind of step with a second array."""

ALL_STEPS = (*UNARY_STEPS, *SCALAR_STEPS, *OPERAND_STEPS)


def apply_steps(steps: Sequence[Step], start: Bounded, operands: Sequence[Tensor]) -> Bounded:
    """Exact results of a chain of steps, with the bound carried along.

    A step with slope L turns a bound b into L * b and adds its own error: for elementary functions
    that of their docstrings (1e-6 of 1 + magnitude), for the others two roundings.

    Args:
        steps: the steps.
        start: what they start from.
        operands: float64 operands of the steps that have one, in order, broadcast to the result.
    """
    remaining = iter(operands)
    exact, bound = start.exact, start.bound
    for step in steps:
        operand = next(remaining) if step.operand != "none" else None
        exact, bound = _apply_step(step, exact, bound, operand)
    return Bounded(exact, bound)


def _apply_step(
    step: Step, x: Tensor, bound: Tensor, operand: Tensor | None
) -> tuple[Tensor, Tensor]:
    if step.kind in _UNARY:
        y = _UNARY[step.kind](x)
        return y, _SLOPES.get(step.kind, 1.0) * bound + 1e-6 * (1 + x.abs())
    if step.kind == "clamp":
        return x.clamp(step.constants[0], step.constants[1]), bound
    if step.kind == "leaky-relu":
        return functional.leaky_relu(x, step.constants[0]), bound + 2 * EPS * x.abs()
    if step.kind == "elu":
        return functional.elu(x, step.constants[0]), bound + 1e-6
    kind = step.kind.removesuffix("-scalar")
    other = torch.tensor(step.constants[0], dtype=x.dtype) if operand is None else operand
    y = _BINARY[kind](x, other.expand_as(x))
    grown = bound * other.abs() if kind == "multiply" else bound
    return y, grown + 2 * EPS * (y.abs() + bound)


def random_array(generator: np.random.Generator, *shape: int) -> Array:
    """Standard normal float32 numbers."""
    return generator.standard_normal(shape).astype(np.float32)
