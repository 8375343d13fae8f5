"""Kernels with a warp for every row: softmax, layer normalisation, averages of planes."""

import math
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import (
    WARP,
    WarpKernel,
    for_each,
    larger,
    warp_largest,
    warp_sum,
)
from shohin.backends.tvm.kernels import vector_math as vm
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Parameter, local, store


@dataclass(frozen=True)
class Softmax(WarpKernel):
    """Softmax of rows, or its logarithm.

    Attributes:
        rows: how many.
        columns: elements of a row.
        logarithm: whether to give logarithms.
    """

    rows: int
    columns: int
    logarithm: bool = False

    @property
    def family(self) -> str:
        """``softmax`` or ``log_softmax``."""
        return "log_softmax" if self.logarithm else "softmax"

    @property
    def results(self) -> int:
        """A row each."""
        return self.rows

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        shape = (self.rows, self.columns)
        return Parameter("x", shape), Parameter("y", shape)

    def emit_result(self, index: Expr, lane: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row."""
        x, y = buffers
        held = local(2)
        store(held, [0], T.float32(-math.inf))
        store(held, [1], T.float32(0))
        for_each(self.columns, lane, WARP, lambda i: store(held, [0], larger(held[0], x[index, i])))
        largest = warp_largest(held[0])

        def add(i: Expr) -> None:
            store(held, [1], held[1] + vm.exp(x[index, i] - largest))

        for_each(self.columns, lane, WARP, add)
        total = warp_sum(held[1])

        def finish(i: Expr) -> None:
            shifted = x[index, i] - largest
            value = shifted - T.log(total) if self.logarithm else vm.exp(shifted) / total
            store(y, [index, i], value)

        for_each(self.columns, lane, WARP, finish)


@dataclass(frozen=True)
class LayerNorm(WarpKernel):
    """Rows of mean 0 and variance 1, perhaps scaled and shifted.

    Attributes:
        rows: how many.
        columns: elements of a row.
        epsilon: added to the variance.
        affine: whether there are weights and biases.
    """

    rows: int
    columns: int
    epsilon: float
    affine: bool

    @property
    def family(self) -> str:
        """``layer_norm``."""
        return "layer_norm"

    @property
    def results(self) -> int:
        """A row each."""
        return self.rows

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights and biases if any, output."""
        shape = (self.rows, self.columns)
        affine = (Parameter("weight", (self.columns,)), Parameter("bias", (self.columns,)))
        return Parameter("x", shape), *(affine if self.affine else ()), Parameter("y", shape)

    def emit_result(self, index: Expr, lane: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row."""
        x, *affine, y = buffers
        held = local(2)
        store(held, [0], T.float32(0))
        store(held, [1], T.float32(0))
        for_each(self.columns, lane, WARP, lambda i: store(held, [0], held[0] + x[index, i]))
        mean = T.bind(warp_sum(held[0]) * T.float32(1 / self.columns))

        def add(i: Expr) -> None:
            apart = T.bind(x[index, i] - mean)
            store(held, [1], held[1] + apart * apart)

        for_each(self.columns, lane, WARP, add)
        variance = warp_sum(held[1]) * T.float32(1 / self.columns)
        scale = T.bind(T.float32(1) / T.sqrt(variance + T.float32(self.epsilon)))

        def finish(i: Expr) -> None:
            value = (x[index, i] - mean) * scale
            store(y, [index, i], value * affine[0][i] + affine[1][i] if affine else value)

        for_each(self.columns, lane, WARP, finish)


@dataclass(frozen=True)
class PlaneAverage(WarpKernel):
    """The average of every plane.

    Attributes:
        planes: images times channels.
        pixels: of a plane.
    """

    planes: int
    pixels: int

    @property
    def family(self) -> str:
        """``plane_average``."""
        return "plane_average"

    @property
    def results(self) -> int:
        """A plane each."""
        return self.planes

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        return Parameter("x", (self.planes, self.pixels)), Parameter("y", (self.planes,))

    def emit_result(self, index: Expr, lane: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One plane."""
        x, y = buffers
        held = local(1)
        store(held, [0], T.float32(0))
        for_each(self.pixels, lane, WARP, lambda i: store(held, [0], held[0] + x[index, i]))
        total = warp_sum(held[0])
        with T.If(lane == 0), T.Then():
            store(y, [index], total * T.float32(1 / self.pixels))
