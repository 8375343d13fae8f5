"""Sums of every subset of a few neighbouring inputs, as tables that ternary weights choose from.

Of three inputs there are eight sums, one register of AVX2; of four, sixteen, one of AVX-512. They
are the same for all outputs of a layer.
"""

from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import (
    Buffer,
    Expr,
    Kernel,
    Parameter,
    ceil_div,
    number,
    ramp,
    splat,
    store,
)

_WORD = 32
"""Bits of a word."""


@dataclass(frozen=True)
class SubsetForm:
    """How many inputs a table is of, and how ternary codes are packed to choose from tables.

    Of the bits of a group of inputs, the lower half says which of them are added, the upper half
    which are subtracted.

    Attributes:
        group: inputs of a table: 3 or 4.
    """

    group: int

    @classmethod
    def of(cls, lanes: int) -> "SubsetForm":
        """The form whose tables are registers of so many floats, 8 or 16."""
        return cls(lanes.bit_length() - 1)

    @property
    def lanes(self) -> int:
        """Sums of a table."""
        return 1 << self.group

    @property
    def bits(self) -> int:
        """Bits of a group's codes."""
        return 2 * self.group

    @property
    def groups(self) -> int:
        """Groups of a word."""
        return _WORD // self.bits

    @property
    def inputs(self) -> int:
        """Inputs of a word."""
        return self.groups * self.group

    def words(self, depth: int) -> int:
        """Words of so many inputs."""
        return ceil_div(depth, self.inputs)

    def pack(self, codes: NDArray[np.int8]) -> NDArray[np.uint32]:
        """The words ``[words, N]`` of whole words of codes ``[N, words * inputs]``."""
        columns = codes.shape[0]
        groups = codes.reshape(columns, -1, self.groups, self.group)
        words = np.zeros((groups.shape[1], columns), np.uint32)
        for place in range(self.groups):
            for index in range(self.group):
                one = groups[:, :, place, index].T
                low = place * self.bits + index
                words |= (one > 0).astype(np.uint32) << np.uint32(low)
                words |= (one < 0).astype(np.uint32) << np.uint32(low + self.group)
        return words

    def shape(self, rows: int, depth: int) -> tuple[int, int, int, int]:
        """Shape of the tables of rows of inputs."""
        return (rows, self.words(depth), self.groups, self.lanes)


@dataclass(frozen=True)
class SubsetSums(Kernel):
    """Tables ``[M, words, groups, lanes]`` of ``x`` ``[M, K]``; entry i adds inputs by its bits.

    Attributes:
        rows: M.
        depth: K.
        form: tables.
    """

    rows: int
    depth: int
    form: SubsetForm

    @property
    def family(self) -> str:
        """``subset_sums``."""
        return "subset_sums"

    @property
    def extent(self) -> int:
        """Rows times words."""
        return self.rows * self.form.words(self.depth)

    @property
    def operations(self) -> int:
        """Sums."""
        _, words, groups, lanes = self.form.shape(self.rows, self.depth)
        return self.rows * words * groups * lanes

    def parameters(self) -> tuple[Parameter, ...]:
        """Inputs, tables."""
        return (
            Parameter("x", (self.rows, self.depth)),
            Parameter("tables", self.form.shape(self.rows, self.depth)),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The tables of one word; inputs past the end are 0."""
        x, tables = buffers
        form, words = self.form, self.form.words(self.depth)
        row, word = (0, item) if self.rows == 1 else (T.floordiv(item, words), item % words)

        def emit(inputs: int) -> None:
            for group in range(form.groups):
                places = range(group * form.group, min((group + 1) * form.group, inputs))
                values = [splat(x[row, word * form.inputs + p], form.lanes) for p in places]
                store(tables, [row, word, group, ramp(0, form.lanes)], _sums(values, form.lanes))

        whole_or_rest(word, form.inputs, self.depth, emit)


def _sums(values: list[Expr], lanes: int) -> Expr:
    """The sum of those values whose bit is set in the number of a lane."""
    zero = number(0.0, lanes)
    lane = T.ramp(0, 1, lanes)
    chosen = [
        T.Select(T.bitwise_and(lane, splat(T.int32(1 << bit), lanes)) != 0, value, zero)
        for bit, value in enumerate(values)
    ]
    return reduce(add, chosen, zero) if len(chosen) != 1 else chosen[0]
