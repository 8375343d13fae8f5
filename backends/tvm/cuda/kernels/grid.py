"""What every CUDA kernel is made with: blocks of threads, and memory that they share.

Three forms cover all templates: a thread for every element (`PointKernel`), a warp of 32 threads
for every result (`WarpKernel`), and blocks that form products of tiles (`tiles.TiledProduct`).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import Buffer, Expr, Template, ceil_div, store
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps

WARP = 32
"""Threads that run in step and can exchange registers."""

_BLOCK = 256

BlockIndex: TypeAlias = tuple[Expr, Expr]


@dataclass(frozen=True)
class GridKernel(Template):
    """A kernel of a GPU: a grid of blocks of threads."""

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Blocks along x and y."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block, a multiple of 32."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return 0 in self.grid

    @abstractmethod
    def emit(self, block: BlockIndex, thread: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Emit the code of one thread."""

    def build(self) -> Any:
        """The kernel as a TIR PrimFunc whose threads are bound to those of the GPU."""
        columns, rows = self.grid
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name(self.family)
            T.func_attr({"tirx.noalias": True})
            buffers = self.declare()
            with (
                T.launch_thread("blockIdx.x", columns) as x,
                T.launch_thread("blockIdx.y", rows) as y,
                T.launch_thread("threadIdx.x", self.threads) as thread,
            ):
                self.emit((x, y), thread, buffers)
        return builder.get()


@dataclass(frozen=True)
class PointKernel(GridKernel):
    """A thread for every element of the result."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """How many."""

    @abstractmethod
    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Emit the code of one element."""

    @property
    def grid(self) -> tuple[int, int]:
        """Elements over the threads of a block."""
        return (ceil_div(self.elements, self.threads), 1)

    @property
    def threads(self) -> int:
        """As many as there are elements, at most 256."""
        return min(_BLOCK, max(WARP, ceil_div(self.elements, WARP) * WARP))

    def emit(self, block: BlockIndex, thread: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The element of a thread, if there is one for it."""
        index = T.bind(block[0] * self.threads + thread)
        if self.elements % self.threads == 0:
            self.emit_element(index, buffers)
            return
        with T.If(index < self.elements), T.Then():
            self.emit_element(index, buffers)


@dataclass(frozen=True)
class WarpKernel(GridKernel):
    """A warp for every result: its threads form parts, which are put together at the end."""

    @property
    @abstractmethod
    def results(self) -> int:
        """How many."""

    @abstractmethod
    def emit_result(self, index: Expr, lane: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Emit the code of one thread of a result's warp."""

    @property
    def grid(self) -> tuple[int, int]:
        """Results over the warps of a block."""
        return (ceil_div(self.results, self.threads // WARP), 1)

    @property
    def threads(self) -> int:
        """Eight warps; fewer where there are fewer results."""
        return min(_BLOCK, max(1, self.results) * WARP)

    def emit(self, block: BlockIndex, thread: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The result of a warp, if there is one for it."""
        warps = self.threads // WARP
        index = T.bind(block[0] * warps + T.floordiv(thread, WARP))
        lane = T.bind(T.floormod(thread, WARP))
        if self.results % warps == 0:
            self.emit_result(index, lane, buffers)
            return
        with T.If(index < self.results), T.Then():
            self.emit_result(index, lane, buffers)


def shared(shape: tuple[int, ...], dtype: str) -> Buffer:
    """Memory that the threads of a block share."""
    frame = T.alloc_buffer(shape, dtype, scope="shared")
    return getattr(frame, "buffer", frame)


def synchronise() -> None:
    """Wait for all threads of the block."""
    T.evaluate(T.tvm_storage_sync("shared"))


def device_call(result: str, name: str, *arguments: Expr) -> Expr:
    """A call without side effects of a function of ``shohin_device.cuh``, or of CUDA's own."""
    return T.call_pure_extern(result, name, *arguments)


def warp_sum(value: Expr) -> Expr:
    """The sum over the threads of a warp, for all of them."""
    return T.bind(device_call("float32", "shohin_warp_sum", value))


def warp_total(value: Expr) -> Expr:
    """The sum of 32-bit integers over the threads of a warp, for all of them."""
    return T.bind(device_call("int32", "shohin_warp_total", value))


def warp_largest(value: Expr) -> Expr:
    """The largest over the threads of a warp, for all of them; NaN is the largest of all."""
    return T.bind(device_call("float32", "shohin_warp_largest", value))


def larger(held: Expr, value: Expr) -> Expr:
    """The larger of two floats; NaN is the largest of all, as in PyTorch."""
    return device_call("float32", "shohin_larger", held, value)


def joined_bytes(values: Sequence[Expr]) -> Expr:
    """Four bytes as one word, the first in its lowest bits."""
    parts = [
        T.shift_left(T.bitwise_and(T.cast(value, "int32"), T.int32(255)), T.int32(8 * i))
        for i, value in enumerate(values)
    ]
    return T.bitwise_or(T.bitwise_or(parts[0], parts[1]), T.bitwise_or(parts[2], parts[3]))


def for_each(count: int, start: Expr, step: int, emit: Callable[[Expr], None]) -> None:
    """``for (i = start; i < count; i += step)``, for every thread a `start` below `step`."""
    with T.serial(0, count // step) as turn:
        emit(turn * step + start)
    if count % step:
        last = T.bind(start + count // step * step)
        with T.If(last < count), T.Then():
            emit(last)


def finish(
    steps: tuple[Step, ...],
    value: Expr,
    operands: tuple[Buffer, ...],
    place: Expr,
    channel: Expr,
) -> Expr:
    """A result after the steps.

    Args:
        steps: what to do.
        value: the result so far: float32, int32, or a wider sum.
        operands: flat arrays: of the result's shape, or one number per channel.
        place: where the result goes, in the flat output.
        channel: its channel.
    """
    return apply_steps(
        steps, value, operands, lambda buffer: buffer[place], lambda buffer: buffer[channel]
    )


def put(y: Buffer, place: Expr, value: Expr, dtype: str) -> None:
    """Store a result as its element type."""
    store(y, [place], value if dtype == "float32" else T.cast(value, dtype))


def taken(value: Expr, dtype: str) -> Expr:
    """An element as kernels calculate with it: integers have 32 bits."""
    return value if dtype == "float32" else T.cast(value, "int32")
