"""Fully connected layers with few weights, for one row or a few.

Every output has lists of its weights and of the inputs they belong to. A weight is two loads and
one multiply-add, which on many processors is as fast as gathering and needs no vectors. One work
item is a group of outputs; groups have about equally many weights.
"""

from dataclasses import dataclass

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import either
from shohin.backends.tvm.kernels.emit import LANES, Array, Buffer, Expr, ceil_div, local, store
from shohin.backends.tvm.kernels.epilogue import apply_steps
from shohin.backends.tvm.kernels.groups import Counts, Lists, even_groups
from shohin.backends.tvm.kernels.list_linear import ListLinear

_CHUNK = 4096
"""Inputs that lists are cut at, so that those in use stay in the first level cache."""


@dataclass(frozen=True)
class SparseLinear(ListLinear):
    """Every output has lists of its own, one for each chunk of inputs."""

    lanes = 1

    @property
    def family(self) -> str:
        """``sparse_linear``."""
        return "sparse_linear"

    @property
    def operations(self) -> int:
        """Entries; a scalar counts as much as a vector."""
        return self.rows * (self.entries + 8 * self.columns) * LANES

    @property
    def index_dtype(self) -> str:
        """Numbers within a chunk."""
        return "uint16"

    @property
    def chunks(self) -> int:
        """Chunks of inputs."""
        return ceil_div(self.depth, _CHUNK)

    @property
    def chunk(self) -> int:
        """Inputs of every chunk but the last."""
        return _CHUNK

    @property
    def last_inputs(self) -> int:
        """Inputs of the last chunk."""
        return self.depth - (self.chunks - 1) * _CHUNK

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
        place = [row, column]
        sums = local(self.sums)
        for one in range(self.sums):
            store(sums, [one], T.float32(0.0))
        either(
            self.chunks == 1 or chunk == 0,
            lambda: store(sums, [0], bias[column]),
            lambda: store(sums, [0], y[tuple(place)]),
        )
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
                lambda buffer: buffer[tuple(place)],
                lambda buffer: buffer[column],
            )
            store(y, place, result)

        last = self.chunks == 1 or chunk == self.chunks - 1
        either(last, finish, lambda: store(y, place, sums[0]))

    @staticmethod
    def counts(weight: Array) -> Counts:
        """``[chunks, N]``: weights of each output in each chunk of inputs."""
        starts = range(0, weight.shape[1], _CHUNK)
        parts = [np.count_nonzero(weight[:, s : s + _CHUNK], axis=1) for s in starts]
        return np.stack(parts)

    def pack(self, weight: Array) -> dict[str, Array]:
        """Weights as lists, by the names of parameters."""
        counts = self.counts(weight)
        lists = Lists(counts.reshape(-1), self.sums)
        value = np.zeros(max(1, self.entries), np.float32)
        index = np.zeros(max(1, self.entries), self.index_dtype)
        for chunk in range(self.chunks):
            part = weight[:, chunk * _CHUNK : (chunk + 1) * _CHUNK]
            rows, columns = np.nonzero(part)
            at = lists.places(chunk * self.columns + rows)
            value[at], index[at] = part[rows, columns], columns
        lengths = lists.lengths.reshape(counts.shape).sum(axis=0)
        return {
            "value": value,
            "index": index,
            "start": lists.start,
            "group": even_groups(lengths, self.groups),
        }
