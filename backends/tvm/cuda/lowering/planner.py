"""Planning for a GPU: a kernel for every operation, a place for every array, all row-major."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shohin.backends.tvm.cuda.kernels.grid import GridKernel
from shohin.backends.tvm.cuda.kernels.points import Copy
from shohin.backends.tvm.cuda.target import CudaTarget
from shohin.backends.tvm.lowering.calls import KernelCall
from shohin.backends.tvm.lowering.memory import ALIGNMENT, Buffer, ConstantFile, Placement
from shohin.backends.tvm.lowering.operations import Array, Operation, Operations, Value
from shohin.backends.tvm.lowering.values import constant_numbers, dtype_text, numpy_of
from shohin.errors import UnsupportedError

_MOST_ELEMENTS = 1 << 31
_MOST_BLOCKS = 65535
"""Along the second axis of a grid."""

Placer = Callable[["CudaPlanner", Any], None]


@dataclass
class CudaPlanner:
    """Turns operations into launches.

    Attributes:
        target: the GPU.
        constants: where packed weights go.
        placers: how to plan each kind of operation.
    """

    target: CudaTarget
    constants: ConstantFile
    placers: dict[type[Operation], Placer]
    calls: list[KernelCall] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    _places: dict[Value, Placement] = field(default_factory=dict)
    _notes: dict[str, str] = field(default_factory=dict)

    def plan(self, operations: Operations) -> list[KernelCall]:
        """Plan every operation, and put the outputs where the caller wants them."""
        for index, value in enumerate(operations.inputs):
            self._places[value] = Placement(Buffer("input", value.bytes, index))
        for operation in operations.operations:
            self.placers[type(operation)](self, operation)
        for index, value in enumerate(operations.outputs):
            self._place_output(index, value)
        return self.calls

    def call(
        self, kernel: GridKernel, arguments: list[Placement], label: str, macs: int = 0
    ) -> None:
        """Append a launch, noting what it keeps alive; none where there is nothing to compute.

        Raises:
            UnsupportedError: when an array or the grid is larger than kernels can count.
        """
        if kernel.is_empty:
            return
        _check_size(kernel, label)
        self.call_function(kernel, arguments, kernel.grid[0] * kernel.grid[1], label, macs)

    def call_function(
        self, function: Any, arguments: list[Placement], blocks: int, label: str, macs: int = 0
    ) -> None:
        """Append a launch of a template instance, or of the TIR function of a region."""
        for argument in arguments:
            argument.buffer.touch(len(self.calls))
        note = self._notes.get(label, "")
        call = KernelCall(function, tuple(arguments), blocks, 1, label, 0, macs, note)
        self.calls.append(call)

    def note(self, label: str, text: str) -> None:
        """Say something of the calls of that label that follow."""
        self._notes[label] = text

    def new_buffer(self, size: int) -> Placement:
        """Fresh memory in the arena."""
        buffer = Buffer("arena", max(1, size))
        self.buffers.append(buffer)
        return Placement(buffer)

    def constant(self, pack: Callable[[], Array]) -> Placement:
        """A constant.

        Args:
            pack: gives the array; called only when constants are really written.
        """
        return self.constants.add(pack)

    def define(self, value: Value) -> Placement:
        """Memory for a value about to be computed."""
        self._places[value] = self.new_buffer(value.bytes)
        return self._places[value]

    def place(self, value: Value, placement: Placement) -> None:
        """Say where a value lies."""
        self._places[value] = placement

    def value(self, value: Value) -> Placement:
        """Where a value lies."""
        if value not in self._places:
            if value.constant is None:
                raise AssertionError(f"{value.name} is read before it is computed")
            constant = value.constant
            self._places[value] = self.constant(lambda: numpy_of(constant))
        return self._places[value]

    def view(self, value: Value, source: Value, offset: int) -> None:
        """Make a value the elements of another from an offset on; copied where kernels need it."""
        base = self.value(source)
        shift = offset * value.dtype.itemsize
        if shift % ALIGNMENT == 0:
            self.place(value, Placement(base.buffer, base.offset + shift))
            return
        moved = Placement(base.buffer, base.offset + shift)
        self._copy(value, moved, self.define(value), "copy")

    def operands(self, operation: Operation) -> list[Placement]:
        """Places of the second operands of an operation's steps."""
        places = []
        for step in operation.steps:
            if step.operand is not None and step.step.operand == "channel":
                places.append(self.constant(partial(_flat_numbers, step.operand)))
            elif step.operand is not None:
                places.append(self.value(step.operand))
        return places

    def _copy(self, value: Value, source: Placement, target: Placement, what: str) -> None:
        kernel = Copy(1, value.elements, value.elements, 0, _stored(value))
        self.call(kernel, [source, target], f"{value.name}: {what}")

    def _place_output(self, index: int, value: Value) -> None:
        """Let the last kernel write to the caller's memory, or copy there."""
        place = self.value(value)
        buffer = place.buffer
        if buffer.kind == "arena" and place.offset == 0 and buffer.bytes == value.bytes:
            buffer.kind, buffer.index = "output", index
            return
        if value.elements:
            output = Placement(Buffer("output", value.bytes, index))
            self._copy(value, place, output, "copy to output")


def _check_size(kernel: GridKernel, label: str) -> None:
    x, y = kernel.grid
    if x >= _MOST_ELEMENTS or y > _MOST_BLOCKS:
        raise UnsupportedError(label, f"needs a grid of {x} x {y} blocks, too many for a GPU")
    for parameter in kernel.parameters():
        if math.prod(parameter.shape) >= _MOST_ELEMENTS:
            problem = f"an array of {math.prod(parameter.shape)} elements; at most 2**31 - 1 can be"
            raise UnsupportedError(label, problem, "compile for a smaller batch")


def _flat_numbers(value: Value) -> Array:
    return constant_numbers(value).reshape(-1)


def _stored(value: Value) -> str:
    """Element type to copy a value as."""
    return "int8" if value.dtype.itemsize == 1 else dtype_text(value.dtype)
