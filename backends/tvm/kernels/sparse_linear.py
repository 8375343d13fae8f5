"""Fully connected layers with few weights, for one row or a few.

Two forms. Lists: every output has its weights and the inputs they belong to; a weight is two
loads and one multiply-add, which on many processors is as fast as gathering and needs no vectors.
Blocks: sixteen neighbouring outputs share an input or do without it; a block is a broadcast and
one vector multiply-add, and costs little more than reading it. One work item is a group of
outputs; groups have about equally many weights.
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
    number,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes

GROUP_WEIGHTS = 4096
"""Weights of a work item: enough to outweigh its start, few enough to share out evenly."""

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


@dataclass(frozen=True)
class BlockSparseLinear(Kernel):
    """``y = steps(x @ w.T + bias)`` with blocks of sixteen outputs and one input.

    Attributes:
        rows: rows of ``x`` ``[M, K]`` and ``y`` ``[M, N]``.
        depth: K.
        columns: N.
        blocks: blocks with weights, filled up to whole multiples of `sums`.
        groups: work items.
        sums: independent sums of a block.
        steps: element-wise steps; ``full`` operands are ``[M, N]``, ``channel`` ones along N and
            padded to whole blocks.
    """

    rows: int
    depth: int
    columns: int
    blocks: int
    groups: int
    sums: int
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``block_linear``."""
        return "block_linear"

    @property
    def block_rows(self) -> int:
        """Blocks of outputs."""
        return ceil_div(self.columns, LANES)

    @property
    def extent(self) -> int:
        """Groups of blocks of outputs."""
        return self.groups

    @property
    def operations(self) -> int:
        """Multiply-accumulates."""
        return self.rows * (self.blocks + 4 * self.block_rows) * LANES

    @property
    def index_dtype(self) -> str:
        """The narrowest type for an input's number."""
        return "uint16" if self.depth <= 1 << 16 else "int32"

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, values, indices, starts of lists, groups, bias, step operands, rows."""
        result, width = (self.rows, self.columns), self.block_rows * LANES
        return (
            Parameter("x", (self.rows, self.depth)),
            Parameter("value", (max(1, self.blocks), LANES)),
            Parameter("index", (max(1, self.blocks),), self.index_dtype),
            Parameter("start", (self.block_rows + 1,), "int32"),
            Parameter("group", (self.groups + 1,), "int32"),
            Parameter("bias", (width,)),
            *operand_parameters(self.steps, result, width),
            Parameter("y", result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The blocks of outputs of one group."""
        group = buffers[4]
        low = group[item]
        whole, valid = divmod(self.columns, LANES)
        with T.serial(0, group[item + 1] - low) as output, T.serial(0, self.rows) as row:
            block = low + output
            if valid == 0:
                self._block(buffers, row, block, LANES)
            elif whole == 0:
                self._block(buffers, row, block, valid)
            else:
                with T.If(block < whole):
                    with T.Then():
                        self._block(buffers, row, block, LANES)
                    with T.Else():
                        self._block(buffers, row, block, valid)

    def _block(self, buffers: tuple[Buffer, ...], row: Expr, block: Expr, valid: int) -> None:
        x, value, index, start, _, bias, *operands, y = buffers
        count = self.sums
        sums = local(count * LANES)
        for one in range(count):
            store(sums, [ramp(one * LANES)], number(0.0))
        begin = start[block]
        with T.serial(0, T.floordiv(start[block + 1] - begin, count)) as step:
            for one in range(count):
                at = begin + step * count + one
                weighed = splat(x[row, T.cast(index[at], "int32")]) * value[at, ramp(0)]
                lane = ramp(one * LANES)
                store(sums, [lane], sums[lane] + weighed)
        column = block * LANES
        total = bias[ramp(column)]
        for one in range(count):
            total = total + sums[ramp(one * LANES)]

        def place(last: Expr) -> list[Expr]:
            return [row, last]

        result = apply_steps(
            self.steps,
            total,
            tuple(operands),
            lambda buffer: load_lanes(buffer, place, column, valid),
            lambda buffer: buffer[ramp(column)],
        )
        store_lanes(y, place, column, result, valid)

    def sample(self) -> dict[str, Array]:
        """Lists of equal length."""
        generator = np.random.default_rng(0)
        index = generator.integers(0, self.depth, max(1, self.blocks))
        units = np.arange(self.block_rows + 1) * (self.blocks // self.sums) // self.block_rows
        start = units * self.sums
        return {
            "index": index.astype(self.index_dtype),
            "start": start.astype(np.int32),
            "group": even_groups(np.diff(start), self.groups),
        }


def block_entries(weight: Array, sums: int) -> int:
    """Blocks of the lists of ``[N, K]`` weights."""
    return int((-(-_used_blocks(weight).sum(axis=1) // sums) * sums).sum())


def _used_blocks(weight: Array) -> NDArray[np.bool_]:
    """``[N/16, K]``: whether any of sixteen outputs has a weight for an input."""
    rows = ceil_div(weight.shape[0], LANES)
    full = np.zeros((rows * LANES, weight.shape[1]), np.bool_)
    full[: weight.shape[0]] = weight != 0
    return np.asarray(full.reshape(rows, LANES, -1).any(axis=1))


def pack_blocks(weight: Array, kernel: BlockSparseLinear) -> dict[str, Array]:
    """``[N, K]`` weights as the kernel's blocks, by the names of its parameters."""
    used = _used_blocks(weight)
    counts = used.sum(axis=1)
    sums = kernel.sums
    lengths = -(-counts // sums) * sums
    start = np.concatenate([[0], np.cumsum(lengths)])
    rows, columns = np.nonzero(used)
    first = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(rows.size) - first[rows] + start[rows]
    full = np.zeros((kernel.block_rows * LANES, weight.shape[1]), np.float32)
    full[: weight.shape[0]] = weight
    value = np.zeros((max(1, kernel.blocks), LANES), np.float32)
    index = np.zeros(max(1, kernel.blocks), kernel.index_dtype)
    value[places] = full.reshape(kernel.block_rows, LANES, -1)[rows, :, columns]
    index[places] = columns
    return {
        "value": value,
        "index": index,
        "start": start.astype(np.int32),
        "group": even_groups(lengths, kernel.groups),
    }


def even_groups(weights: NDArray[np.integer], groups: int) -> Array:
    """First output of each group and the end, with about equally many weights between."""
    work = np.cumsum(np.asarray(weights, np.int64) + 4)
    bounds = [int(np.searchsorted(work, work[-1] * g / groups)) for g in range(1, groups)]
    return np.array([0, *bounds, len(weights)], np.int32)
