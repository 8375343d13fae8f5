"""Convolutions with a thread for every output: depthwise ones, wide integers, sparse weights."""

import math
from dataclasses import dataclass
from typing import Literal

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import (
    BlockIndex,
    GridKernel,
    PointKernel,
    finish,
    put,
)
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Parameter, ceil_div, local, store
from shohin.backends.tvm.kernels.epilogue import Step, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class DirectConv2d(PointKernel):
    """2-d convolution in groups, one output a thread.

    Attributes:
        batch: images.
        channels: of an image.
        filters: how many.
        groups: of channels.
        geometry: where windows lie.
        source: element type of the image.
        weight: element type of the weights.
        total: type of sums and biases.
        result: element type of the results.
        steps: on the results.
    """

    batch: int
    channels: int
    filters: int
    groups: int
    geometry: Geometry
    source: str = "float32"
    weight: str = "float32"
    total: Literal["float32", "int32", "int64"] = "float32"
    result: str = "float32"
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``direct_conv2d``."""
        return "direct_conv2d"

    @property
    def elements(self) -> int:
        """Of the output."""
        return self.batch * self.filters * math.prod(self.geometry.output_size)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, biases, step operands, output."""
        inputs = self.batch * self.channels * math.prod(self.geometry.size)
        weights = self.filters * self._depth * math.prod(self.geometry.kernel)
        return (
            Parameter("x", (inputs,), self.source),
            Parameter("w", (weights,), self.weight),
            Parameter("bias", (self.filters,), self.total),
            *operand_parameters(self.steps, (self.elements,), self.filters),
            Parameter("y", (self.elements,), self.result),
        )

    @property
    def _depth(self) -> int:
        return self.channels // self.groups

    def emit_element(self, index: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One output."""
        x, weights, bias, *operands, y = buffers
        shape, (height, width) = self.geometry, self.geometry.output_size
        row, column = T.floormod(T.floordiv(index, width), height), T.floormod(index, width)
        filter_ = T.bind(T.floormod(T.floordiv(index, height * width), self.filters))
        image = T.floordiv(index, height * width * self.filters)
        group = T.floordiv(filter_, self.filters // self.groups)
        first = T.bind(image * self.channels + group * self._depth)
        total = local(1, self.total)
        store(total, [0], bias[filter_])
        taps = math.prod(shape.kernel)
        with (
            T.serial(0, self._depth) as channel,
            T.serial(0, shape.kernel[0]) as down,
            T.serial(0, shape.kernel[1]) as right,
        ):
            from_row = T.bind(shape.row(row, down))
            from_column = T.bind(shape.column(column, right))
            inside = T.And(
                T.And(from_row >= 0, from_row < shape.size[0]),
                T.And(from_column >= 0, from_column < shape.size[1]),
            )
            with T.If(inside), T.Then():
                place = (first + channel) * shape.size[0] + from_row
                value = x[place * shape.size[1] + from_column]
                at = (filter_ * self._depth + channel) * taps + down * shape.kernel[1] + right
                product = T.cast(value, self.total) * T.cast(weights[at], self.total)
                store(total, [0], total[0] + product)
        value = finish(self.steps, total[0], tuple(operands), index, filter_)
        put(y, index, value, self.result)


@dataclass(frozen=True, kw_only=True)
class SparseConv2d(GridKernel):
    """2-d convolution by the weights that are not zero alone, over images with borders of zeros.

    A block computes neighbouring pixels of one filter, so all its threads go through the same
    list: offsets into the image, and weights.

    Attributes:
        batch: images.
        channels: of an image.
        filters: how many.
        geometry: of windows in the images with borders; it has no padding.
        kept: weights that are not zero.
        steps: on the results.
    """

    batch: int
    channels: int
    filters: int
    geometry: Geometry
    kept: int
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``sparse_conv2d``."""
        return "sparse_conv2d"

    @property
    def threads(self) -> int:
        """128, or as many as an image has pixels."""
        return min(128, ceil_div(self._pixels, 32) * 32)

    @property
    def _pixels(self) -> int:
        return math.prod(self.geometry.output_size)

    @property
    def own(self) -> int:
        """Pixels of a thread: several where the image has enough for all."""
        return 4 if self._pixels >= 4 * self.threads else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Runs of pixels of every filter of every image."""
        return self._runs * self.filters * self.batch, 1

    @property
    def _runs(self) -> int:
        return ceil_div(self._pixels, self.threads * self.own)

    def parameters(self) -> tuple[Parameter, ...]:
        """Input with borders, where lists begin, offsets, weights, biases, operands, output."""
        inputs = self.batch * self.channels * math.prod(self.geometry.size)
        outputs = (self.batch * self.filters * self._pixels,)
        return (
            Parameter("x", (inputs,)),
            Parameter("start", (self.filters + 1,), "int32"),
            Parameter("offsets", (self.kept,), "int32"),
            Parameter("w", (self.kept,)),
            Parameter("bias", (self.filters,)),
            *operand_parameters(self.steps, outputs, self.filters),
            Parameter("y", outputs),
        )

    def emit(self, block: BlockIndex, thread: Expr, buffers: tuple[Buffer, ...]) -> None:
        """A few pixels of one filter."""
        x, start, offsets, weights, bias, *operands, y = buffers
        run = T.bind(T.floormod(block[0], self._runs))
        filter_ = T.bind(T.floormod(T.floordiv(block[0], self._runs), self.filters))
        image = T.bind(T.floordiv(block[0], self._runs * self.filters))
        shape, width = self.geometry, self.geometry.output_size[1]
        plane = math.prod(shape.size)
        pixels = [T.bind((run * self.own + i) * self.threads + thread) for i in range(self.own)]
        bases = []
        for pixel in pixels:
            # Pixels that do not exist read where the last one does.
            known = T.min(pixel, T.int32(self._pixels - 1))
            row = shape.row(T.floordiv(known, width), 0)
            column = shape.column(T.floormod(known, width), 0)
            bases.append(T.bind(image * (self.channels * plane) + row * shape.size[1] + column))
        sums = local(self.own)
        for i in range(self.own):
            store(sums, [i], bias[filter_])
        first = T.bind(start[filter_])
        with T.serial(0, start[filter_ + 1] - first) as turn:
            offset, weight = T.bind(offsets[first + turn]), T.bind(weights[first + turn])
            for i, base in enumerate(bases):
                store(sums, [i], sums[i] + weight * x[base + offset])
        for i, pixel in enumerate(pixels):
            with T.If(pixel < self._pixels), T.Then():
                target = T.bind((image * self.filters + filter_) * self._pixels + pixel)
                value = finish(self.steps, sums[i], tuple(operands), target, filter_)
                put(y, target, value, "float32")
