"""Fully connected layers whose weights are few and in blocks, for one row or a few.

Sixteen neighbouring outputs share an input or do without it. A block is a broadcast and one vector
multiply-add, and costs little more than reading it. One work item is a group of blocks of outputs;
groups have about equally many weights.
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
from shohin.backends.tvm.kernels.groups import even_groups
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes


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
