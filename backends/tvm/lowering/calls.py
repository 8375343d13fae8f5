"""What planning gives: the calls of a binary in order."""

from dataclasses import dataclass
from typing import Any

from shohin.backends.tvm.lowering.memory import ConstantFile, Placement
from shohin.backends.tvm.lowering.operations import Value


@dataclass(frozen=True)
class KernelCall:
    """One step of a binary.

    Attributes:
        kernel: a template instance, or the TIR function of a region.
        arguments: arrays in the order of the kernel's parameters.
        extent: work items.
        max_parts: most threads that may share the items.
        label: text for profiles.
        operations: scalar operations, roughly.
        macs: multiply-accumulates that the model asks for, padding left out.
        note: why it is this kernel, where there was a choice.
    """

    kernel: Any
    arguments: tuple[Placement, ...]
    extent: int
    max_parts: int
    label: str
    operations: int
    macs: int = 0
    note: str = ""


@dataclass
class Plan:
    """Everything that a binary does, in order, and where its arrays are.

    Attributes:
        calls: the kernel calls in order.
        inputs: the program's inputs.
        outputs: the program's outputs.
        arena_bytes: size of the arena.
        constants: the file of constants.
        narrow: whether some are integers of fewer bits than they lie in.
    """

    calls: list[KernelCall]
    inputs: list[Value]
    outputs: list[Value]
    arena_bytes: int
    constants: ConstantFile
    narrow: bool = False
