"""Fully connected layers whose weights are few and in blocks, for one row or a few.

Sixteen neighbouring outputs share an input or do without it. A block is a broadcast and one vector
multiply-add, and costs little more than reading it. One work item is a group of blocks of outputs;
groups have about equally many weights.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    blocks,
    local,
    number,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import apply_steps
from shohin.backends.tvm.kernels.groups import Counts, Lists, even_groups
from shohin.backends.tvm.kernels.list_linear import ListLinear
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes


@dataclass(frozen=True)
class BlockSparseLinear(ListLinear):
    """An entry is the weights of sixteen outputs for one input."""

    lanes = LANES

    @property
    def family(self) -> str:
        """``block_linear``."""
        return "block_linear"

    @property
    def operations(self) -> int:
        """Multiply-accumulates."""
        return self.rows * (self.entries + 4 * self.outputs) * LANES

    @property
    def index_dtype(self) -> str:
        """The narrowest type for an input's number."""
        return "uint16" if self.depth <= 1 << 16 else "int32"

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """The blocks of outputs of one group."""
        group = buffers[4]
        low = group[item]
        with T.serial(0, group[item + 1] - low) as output, T.serial(0, self.rows) as row:
            block = low + output
            whole_or_rest(
                block, LANES, self.columns, lambda valid: self._block(buffers, row, block, valid)
            )

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

    @staticmethod
    def counts(weight: Array) -> Counts:
        """``[N/16]``: blocks with weights of each sixteen outputs."""
        return np.asarray(np.count_nonzero(_used_blocks(weight), axis=1))

    def pack(self, weight: Array) -> dict[str, Array]:
        """Weights as lists of blocks, by the names of parameters."""
        used = _used_blocks(weight)
        rows, columns = np.nonzero(used)
        lists = Lists(np.count_nonzero(used, axis=1), self.sums)
        places = lists.places(rows)
        full = np.zeros((self.width, weight.shape[1]), np.float32)
        full[: weight.shape[0]] = weight
        value = np.zeros((max(1, self.entries), LANES), np.float32)
        index = np.zeros(max(1, self.entries), self.index_dtype)
        value[places] = full.reshape(self.outputs, LANES, -1)[rows, :, columns]
        index[places] = columns
        return {
            "value": value,
            "index": index,
            "start": lists.start,
            "group": even_groups(lists.lengths, self.groups),
        }


def _used_blocks(weight: Array) -> NDArray[np.bool_]:
    """``[N/16, K]``: whether any of sixteen outputs has a weight for an input."""
    rows = blocks(weight.shape[0])
    full = np.zeros((rows * LANES, weight.shape[1]), np.bool_)
    full[: weight.shape[0]] = weight != 0
    return np.asarray(full.reshape(rows, LANES, -1).any(axis=1))
