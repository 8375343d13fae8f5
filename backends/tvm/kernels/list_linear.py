"""What fully connected layers with lists of weights have in common."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from shohin.backends.tvm.kernels.emit import Array, Kernel, Parameter, ceil_div
from shohin.backends.tvm.kernels.epilogue import Step, operand_parameters
from shohin.backends.tvm.kernels.groups import Counts, even_groups
from shohin.backends.tvm.kernels.list_layout import ListLayout


@dataclass(frozen=True)
class ListLinear(Kernel):
    """``y = steps(x @ w.T + bias)`` with lists of weights. One item is a group of outputs.

    Attributes:
        rows: rows of ``x`` ``[M, K]`` and ``y`` ``[M, N]``.
        depth: K.
        columns: N.
        entries: entries of all lists, each filled up to a whole multiple of `sums`.
        groups: work items.
        sums: independent sums of an output.
        steps: element-wise steps; ``full`` operands are ``[M, N]``, ``channel`` ones along N and
            padded to whole blocks of outputs.
    """

    rows: int
    depth: int
    columns: int
    entries: int
    groups: int
    sums: int
    steps: tuple[Step, ...] = ()

    lanes: ClassVar[int]
    """Neighbouring outputs whose weights are one entry."""

    @property
    @abstractmethod
    def index_dtype(self) -> str:
        """Type of an input's number."""

    @staticmethod
    @abstractmethod
    def counts(weight: Array) -> Counts:
        """Entries of every list of ``[N, K]`` weights before it is filled up, outputs last."""

    @abstractmethod
    def pack(self, weight: Array) -> dict[str, Array]:
        """``[N, K]`` weights as lists, by the names of parameters."""

    @property
    def chunks(self) -> int:
        """Chunks of inputs; an output has a list for each."""
        return 1

    @property
    def chunk(self) -> int:
        """Inputs of every chunk but the last."""
        return self.depth

    @property
    def last_inputs(self) -> int:
        """Inputs of the last chunk; others have as many or more."""
        return self.depth

    @property
    def layout(self) -> ListLayout:
        """How numbers of inputs follow from places: every input is one."""
        return ListLayout((0,), 1, min(self.depth, self.chunk), step=self.sums)

    @property
    def outputs(self) -> int:
        """Blocks of outputs that share their lists."""
        return ceil_div(self.columns, self.lanes)

    @property
    def width(self) -> int:
        """Outputs in whole blocks."""
        return self.outputs * self.lanes

    @property
    def extent(self) -> int:
        """Groups of outputs."""
        return self.groups

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, values, indices, starts of lists, groups, bias, step operands, rows."""
        entries, result = max(1, self.entries), (self.rows, self.columns)
        return (
            Parameter("x", (self.rows, self.depth)),
            Parameter("value", (entries, self.lanes) if self.lanes > 1 else (entries,)),
            Parameter("index", (entries,), self.index_dtype),
            Parameter("start", (self.chunks * self.outputs + 1,), "int32"),
            Parameter("group", (self.groups + 1,), "int32"),
            Parameter("bias", (self.width,)),
            *operand_parameters(self.steps, result, self.width),
            Parameter("y", result),
        )

    def sample(self) -> dict[str, Array]:
        """Lists of equal length."""
        generator = np.random.default_rng(0)
        index = generator.integers(0, self.last_inputs, max(1, self.entries))
        lists = self.chunks * self.outputs
        start = np.arange(lists + 1) * (self.entries // self.sums) // lists * self.sums
        lengths = np.diff(start).reshape(self.chunks, self.outputs).sum(axis=0)
        return {
            "index": index.astype(self.index_dtype),
            "start": start.astype(np.int32),
            "group": even_groups(lengths, self.groups),
        }
