"""A convolution and the 1 x 1 convolution that alone reads it, as layers of low rank have them.

A block computes all outputs of some pixels: first what is between the two, which stays in shared
memory, then the outputs from there. Nothing in between is written to the GPU's memory, or read.
"""

from dataclasses import dataclass, replace

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import BlockIndex, GridKernel, synchronise
from shohin.backends.tvm.cuda.kernels.layers import Convolution
from shohin.backends.tvm.cuda.kernels.tiles import MULTIPROCESSORS, Loads, line_of
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Parameter, ceil_div, store

_SHARED_BYTES = 48 << 10
_APART = 8


@dataclass(frozen=True, kw_only=True)
class ConvolutionPair(GridKernel):
    """Both convolutions, of one group each.

    Attributes:
        first: without steps.
        second: reads the results of the first; in the same tile.
    """

    first: Convolution
    second: Convolution

    @property
    def family(self) -> str:
        """``conv_pair``."""
        return "conv_pair"

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of pixels."""
        return ceil_div(self.first.size[2], self.first.tile.columns), 1

    @property
    def threads(self) -> int:
        """Of the tile."""
        return self.first.threads

    def tile_text(self) -> str:
        """That of both."""
        return self.first.tile_text()

    @property
    def _between(self) -> int:
        """Rows of what is between the two, as many as the second reads."""
        tile = self.first.tile
        rows = ceil_div(self.first.size[1], tile.rows) * tile.rows
        return max(rows, ceil_div(self.second.size[3], tile.step) * tile.step)

    @property
    def pays(self) -> bool:
        """Whether what is between fits, and there are blocks enough for the whole GPU."""
        tile = self.first.tile
        columns, rows = tile.columns + _APART, tile.rows + _APART
        words = (self._between + tile.step) * columns + tile.step * rows
        return 4 * words <= _SHARED_BYTES and self.grid[0] >= MULTIPROCESSORS

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights and biases of the first, then those of the second, operands, output."""
        x, *first, _ = self.first.parameters()
        _, *second = self.second.parameters()
        return (x, *(replace(one, name=f"first_{one.name}") for one in first), *second)

    def emit(self, block: BlockIndex, thread: Expr, buffers: tuple[Buffer, ...]) -> None:
        """All outputs of a tile of pixels."""
        tile, word = self.first.tile, self.first.word
        count = len(self.first.parameters()) - 1
        between = line_of(self._between, tile.columns, word)
        lines = line_of(tile.step, tile.rows, word), line_of(tile.step, tile.columns, word)
        column = T.bind(block[0] * tile.columns)
        with T.serial(0, ceil_div(self.first.size[1], tile.rows)) as turn:
            self._emit_between(thread, (*buffers[:count], buffers[-1]), lines, between,
                               (T.bind(turn * tile.rows), column))  # fmt: skip
        synchronise()
        with T.serial(0, ceil_div(self.second.size[1], tile.rows)) as turn:
            self._emit_outputs(thread, (buffers[0], *buffers[count:]), lines[0], between,
                               (T.bind(turn * tile.rows), column))  # fmt: skip

    def _emit_between(
        self,
        thread: Expr,
        buffers: tuple[Buffer, ...],
        lines: tuple[Buffer, Buffer],
        between: Buffer,
        first: tuple[Expr, Expr],
    ) -> None:
        """Rows of what is between, from `first` on; zeros for those that do not exist."""
        loads = Loads(self.first, buffers, T.int32(0), first, thread)
        sums = self.first.accumulate(thread, loads, lines)
        for row, column, total in self.first.results(thread, sums):
            place = T.bind(first[0] + row)
            store(between, [place, column], self.first.biased(buffers, place, total))

    def _emit_outputs(
        self,
        thread: Expr,
        buffers: tuple[Buffer, ...],
        line: Buffer,
        between: Buffer,
        first: tuple[Expr, Expr],
    ) -> None:
        """Rows of the results, from `first` on."""
        second, step = self.second, self.second.tile.step
        loads = Loads(second, buffers, T.int32(0), first, thread)
        sums = second.zeros()
        with T.serial(0, ceil_div(second.size[3], step)) as turn:
            loads.emit_left(turn * step, line)
            synchronise()
            second.multiply(thread, (line, between), sums, T.bind(turn * step))
            synchronise()
        for row, column, total in second.results(thread, sums):
            place = (T.int32(0), first[0] + row, first[1] + column)
            second.finish_existing(buffers, place, total)
