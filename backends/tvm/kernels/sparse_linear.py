"""Fully connected layers with few weights, for one row or a few.

Every output has lists of its weights and of the inputs they belong to. A weight is two loads and
one multiply-add, which on many processors is as fast as gathering and needs no vectors. One work
item is a group of outputs; groups have about equally many weights.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    ceil_div,
    local,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.groups import even_groups

_CHUNK = 4096
"""Inputs that lists are cut at, so that those in use stay in the first level cache."""


@dataclass(frozen=True)
class SparseLinear(Kernel):
    """``y = steps(x @ w.T + bias)`` with lists of weights.

    Attributes:
        rows: rows of ``x`` ``[M, K]`` and ``y`` ``[M, N]``.
        depth: K.
        columns: N.
        entries: entries of all lists, filled up to whole multiples of `sums`; an output has a
            list for each chunk of inputs.
        groups: work items.
        sums: independent sums of an output.
        steps: element-wise steps; ``full`` operands are ``[M, N]``, ``channel`` ones ``[N]``.
    """

    rows: int
    depth: int
    columns: int
    entries: int
    groups: int
    sums: int
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``sparse_linear``."""
        return "sparse_linear"

    @property
    def extent(self) -> int:
        """Groups of outputs."""
        return self.groups

    @property
    def operations(self) -> int:
        """Entries; a scalar counts as much as a vector."""
        return self.rows * (self.entries + 8 * self.columns) * LANES

    @property
    def chunks(self) -> int:
        """Chunks of inputs."""
        return ceil_div(self.depth, _CHUNK)

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, values, indices, starts of lists, groups, bias, step operands, rows."""
        result = (self.rows, self.columns)
        return (
            Parameter("x", (self.rows, self.depth)),
            Parameter("value", (max(1, self.entries),)),
            Parameter("index", (max(1, self.entries),), "uint16"),
            Parameter("start", (self.chunks * self.columns + 1,), "int32"),
            Parameter("group", (self.groups + 1,), "int32"),
            Parameter("bias", (self.columns,)),
            *operand_parameters(self.steps, result, self.columns),
            Parameter("y", result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The outputs of one group, chunk by chunk; their sums wait in the result."""
        group = buffers[4]
        low = group[item]
        outputs = group[item + 1] - low
        rows = self.rows
        with T.serial(0, self.chunks) as c, T.serial(0, outputs) as o, T.serial(0, rows) as row:
            self._output(buffers, c, low + o, row)

    def _output(self, buffers: tuple[Buffer, ...], chunk: Expr, column: Expr, row: Expr) -> None:
        x, value, index, start, _, bias, *operands, y = buffers
        sums = local(self.sums)
        for one in range(self.sums):
            store(sums, [one], T.float32(0.0))
        if self.chunks == 1:
            store(sums, [0], bias[column])
        else:
            with T.If(chunk == 0):
                with T.Then():
                    store(sums, [0], bias[column])
                with T.Else():
                    store(sums, [0], y[row, column])
        begin = start[chunk * self.columns + column]
        end = start[chunk * self.columns + column + 1]
        with T.serial(0, T.floordiv(end - begin, self.sums)) as step:
            for one in range(self.sums):
                at = begin + step * self.sums + one
                weighed = value[at] * x[row, chunk * _CHUNK + T.cast(index[at], "int32")]
                store(sums, [one], sums[one] + weighed)
        for one in range(1, self.sums):
            store(sums, [0], sums[0] + sums[one])

        def finish() -> None:
            result = apply_steps(
                self.steps,
                sums[0],
                tuple(operands),
                lambda buffer: buffer[row, column],
                lambda buffer: buffer[column],
            )
            store(y, [row, column], result)

        if self.chunks == 1:
            finish()
            return
        with T.If(chunk == self.chunks - 1):
            with T.Then():
                finish()
            with T.Else():
                store(y, [row, column], sums[0])

    def sample(self) -> dict[str, Array]:
        """Lists of equal length."""
        generator = np.random.default_rng(0)
        index = generator.integers(0, min(self.depth, _CHUNK), max(1, self.entries))
        if self.chunks > 1:
            index %= self.depth - (self.chunks - 1) * _CHUNK
        lists = self.chunks * self.columns
        start = np.arange(lists + 1) * (self.entries // self.sums) // lists * self.sums
        return {
            "index": index.astype(np.uint16),
            "start": start.astype(np.int32),
            "group": even_groups(np.full(self.columns, 1), self.groups),
        }


def _counts(weight: Array) -> NDArray[np.int64]:
    """``[chunks, N]``: weights of each output in each chunk of inputs."""
    starts = range(0, weight.shape[1], _CHUNK)
    parts = [np.count_nonzero(weight[:, s : s + _CHUNK], axis=1) for s in starts]
    return np.stack(parts).astype(np.int64)


def list_entries(weight: Array, sums: int) -> int:
    """Entries of the lists of ``[N, K]`` weights."""
    return int((-(-_counts(weight) // sums) * sums).sum())


def pack_rows(weight: Array, kernel: SparseLinear) -> dict[str, Array]:
    """``[N, K]`` weights as the kernel's lists, by the names of its parameters."""
    counts = _counts(weight)
    lengths = -(-counts // kernel.sums) * kernel.sums
    start = np.concatenate([[0], np.cumsum(lengths)])
    first = np.concatenate([[0], np.cumsum(counts)])
    value = np.zeros(max(1, kernel.entries), np.float32)
    index = np.zeros(max(1, kernel.entries), np.uint16)
    for chunk in range(kernel.chunks):
        part = weight[:, chunk * _CHUNK : (chunk + 1) * _CHUNK]
        rows, columns = np.nonzero(part)
        lists = chunk * kernel.columns + rows
        at = first[chunk * kernel.columns] + np.arange(rows.size) - first[lists] + start[lists]
        value[at], index[at] = part[rows, columns], columns
    return {
        "value": value,
        "index": index,
        "start": start.astype(np.int32),
        "group": even_groups(lengths.sum(axis=0), kernel.groups),
    }
