"""What every kernel template is made with: a thin vocabulary over TVM's TIR builder.

A kernel is a plain C function over a range of independent work items::

    int name(const T0 *a, ..., T *out, int32_t begin, int32_t end)

The generated C code decides which thread runs which range, so kernels know nothing of threads,
and every buffer is a raw pointer. Templates are built with TVM's IR builder rather than parsed
TVMScript: the same TIR comes out, but tiles, edges and epilogues are ordinary Python functions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812 - the name every TVM text uses

LANES = 16
"""Floats in one block of channels: one AVX-512 register, two of AVX2, four of NEON."""

Expr: TypeAlias = Any
Buffer: TypeAlias = Any
Array: TypeAlias = NDArray[np.generic]


@dataclass(frozen=True)
class Parameter:
    """One pointer parameter of a kernel: its name, and the array behind it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def bytes(self) -> int:
        """Size of the array."""
        width = 1 if self.dtype == "bool" else int("".join(filter(str.isdigit, self.dtype))) // 8
        return math.prod(self.shape) * width


@dataclass(frozen=True)
class Template(ABC):
    """A kernel instance: a template with its shapes fixed. Equal ones share their code."""

    tiling: ClassVar[frozenset[str]] = frozenset()
    """Names of the fields that variants differ in."""

    @property
    @abstractmethod
    def family(self) -> str:
        """Name of the template, part of the symbol's name."""

    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The pointer parameters in order; the output is the last."""

    @abstractmethod
    def build(self) -> Any:
        """The kernel as a TIR PrimFunc."""

    def tile_text(self) -> str:
        """The tile shape in a few characters; variants differ in it and in nothing else."""
        return ""

    def problem(self) -> str:
        """Text that is the same for all variants and different for everything else."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in self.tiling}
        return f"{self.family} {values}"

    def declare(self) -> tuple[Buffer, ...]:
        """The buffers of the function that is being built."""
        return tuple(
            T.arg(p.name, T.buffer(p.shape, p.dtype, buffer_name=p.name)) for p in self.parameters()
        )


@dataclass(frozen=True)
class Kernel(Template):
    """A kernel of a processor: a function over a range of independent work items."""

    @property
    @abstractmethod
    def extent(self) -> int:
        """Number of independent work items."""

    @abstractmethod
    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Emit the code of one work item."""

    @property
    def operations(self) -> int:
        """Rough number of scalar operations of all items, to decide whether threads pay."""
        return 0

    def variants(self, registers: int) -> tuple["Kernel", ...]:
        """The same computation in other tile shapes, likeliest fastest first; itself among them.

        Args:
            registers: vectors of 16 floats that registers hold, sums and weights together.
        """
        return (self,)

    def sample(self) -> Mapping[str, Array]:
        """Arrays to measure with, by parameter, where any numbers will not do: lists of indices."""
        return {}

    def build(self) -> Any:
        """The kernel as a TIR PrimFunc over ``[begin, end)``."""
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(self.family)
            T.func_attr({"tirx.noalias": True})
            buffers = self.declare()
            begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
            # From zero: TVM moves a loop to zero without moving the bounds of loops inside it.
            with T.serial(0, end - begin) as index:
                self.emit(begin + index, buffers)
        return builder.get()


def ramp(start: Expr, lanes: int = LANES) -> Expr:
    """Index of `lanes` consecutive elements; a plain index where that is one."""
    return T.ramp(start, 1, lanes) if lanes > 1 else start


def splat(value: Expr, lanes: int = LANES) -> Expr:
    """A scalar in every lane."""
    return T.broadcast(value, lanes) if lanes > 1 else value


def number(value: float, lanes: int = LANES) -> Expr:
    """A float constant in every lane."""
    return splat(T.float32(value), lanes)


def constant(value: float, dtype: str, lanes: int = LANES) -> Expr:
    """A number of some element type in every lane."""
    make = {"float32": T.float32, "int8": T.int8, "int16": T.int16, "int32": T.int32}[dtype]
    return splat(make(value if dtype == "float32" else int(value)), lanes)


def local(size: int, dtype: str = "float32") -> Buffer:
    """Scratch that lives in registers once indices are constant, on the stack otherwise."""
    frame = T.alloc_buffer(
        (size,), dtype, scope="local", annotations={"disable_lower_builtin": True}
    )
    return getattr(frame, "buffer", frame)


def store(buffer: Buffer, indices: list[Expr], value: Expr) -> None:
    """``buffer[indices] = value``."""
    T.buffer_store(buffer, value, indices)


def held(value: Expr, lanes: int, dtype: str = "float32") -> Expr:
    """The value from a register: TVM unfolds an expression that is used more than once."""
    register = local(lanes, dtype)
    store(register, [ramp(0, lanes)], value)
    return register[ramp(0, lanes)]


def ceil_div(value: int, divisor: int) -> int:
    """``ceil(value / divisor)``."""
    return -(-value // divisor)


def blocks(channels: int) -> int:
    """Number of channel blocks that hold so many channels."""
    return ceil_div(channels, LANES)
