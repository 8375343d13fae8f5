"""Planning of operations on images."""

import math

import numpy as np

from shohin.backends.tvm.cuda.kernels.direct import DirectConv2d, SparseConv2d
from shohin.backends.tvm.cuda.kernels.layers import Convolution as ConvolutionKernel
from shohin.backends.tvm.cuda.kernels.pairs import ConvolutionPair as PairKernel
from shohin.backends.tvm.cuda.kernels.points import Copy, Pool2d, Window
from shohin.backends.tvm.cuda.kernels.rows import PlaneAverage
from shohin.backends.tvm.cuda.kernels.tiles import Tile, choose_tile
from shohin.backends.tvm.cuda.kernels.weights import Weights
from shohin.backends.tvm.cuda.lowering.planner import CudaPlanner
from shohin.backends.tvm.cuda.lowering.weights import (
    at_least_one,
    biases_of,
    float_form,
    float_unit,
    has_small_groups,
    lists_of,
    weight_places,
)
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.lowering.operations import (
    Concatenation,
    Convolution,
    ConvolutionPair,
    GlobalAveragePooling,
    Pooling,
    WindowCopy,
)
from shohin.backends.tvm.lowering.values import (
    dtype_text,
    geometry_of,
    kernel_steps,
    macs_of,
    numpy_of,
)

_WORTH_LISTS = 0.15
"""Density of weights up to which going through lists of those that are not zero should take less
time than multiplying all: by lists every product reads an input of its own."""


def place_convolution(planner: CudaPlanner, op: Convolution) -> None:
    """A convolution: one output a thread, in tiles of products, or by lists."""
    if has_small_groups(op):
        _note_dense(planner, op)
        _place_direct(planner, op)
        return
    if op.may_be_sparse and op.ternary is None:
        density = float(op.weight.count_nonzero()) / max(1, op.weight.numel())
        if density <= _WORTH_LISTS:
            planner.note(op.label, f"estimated: lists, density {density:.2f}")
            _place_sparse(planner, op)
            return
        planner.note(op.label, f"estimated: dense, density {density:.2f}")
    _place_tiles(planner, op)


def _note_dense(planner: CudaPlanner, op: Convolution) -> None:
    if op.sparse or op.ternary is not None:
        planner.note(op.label, "dense: a convolution in small groups has no other kernel")


def _place_tiles(planner: CudaPlanner, op: Convolution) -> None:
    kernel = _tiled(planner, op)
    arguments = [
        planner.value(op.x),
        *weight_places(planner, op, kernel.weights),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(kernel, arguments, op.label, macs_of(op))


def _tiled(planner: CudaPlanner, op: Convolution, tile: Tile | None = None) -> ConvolutionKernel:
    """The kernel of a convolution in tiles, the best unless given."""
    unit, groups = float_unit(planner), op.groups
    filters = op.output.shape[1] // groups
    pixels = op.output.elements // op.output.shape[1]
    tile = tile or choose_tile(unit, filters, pixels, groups)
    depth = math.prod(op.weight.shape[1:])
    return ConvolutionKernel(
        unit=unit,
        tile=tile,
        weights=Weights(float_form(op), groups, filters, depth, tile),
        batch=op.x.shape[0],
        channels=op.x.shape[1],
        geometry=geometry_of(op),
        steps=kernel_steps(op),
    )


def _place_direct(planner: CudaPlanner, op: Convolution) -> None:
    kernel = DirectConv2d(
        batch=op.x.shape[0],
        channels=op.x.shape[1],
        filters=op.output.shape[1],
        groups=op.groups,
        geometry=geometry_of(op),
        steps=kernel_steps(op),
    )
    arguments = [
        planner.value(op.x),
        planner.constant(lambda: numpy_of(op.weight).reshape(-1)),
        planner.constant(lambda: biases_of(op.bias, op.output.shape[1])),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(kernel, arguments, op.label, macs_of(op))


def _place_sparse(planner: CudaPlanner, op: Convolution) -> None:
    """By lists, over a copy of the images with borders."""
    shape = geometry_of(op)
    top, bottom, left, right = shape.padding
    size = (shape.size[0] + top + bottom, shape.size[1] + left + right)
    batch, channels = op.x.shape[:2]
    x = planner.value(op.x)
    if any(shape.padding):
        bordered = planner.new_buffer(batch * channels * math.prod(size) * 4)
        window = Window(batch, channels, shape.size, channels, size, (0, -top, -left), (1, 1))
        planner.call(window, [x, bordered], f"{op.label}: borders")
        x = bordered
    inside = Geometry(size, shape.kernel, shape.stride, (0, 0, 0, 0), shape.dilation)
    weight = numpy_of(op.weight)
    start, kept, values = lists_of(weight.reshape(weight.shape[0], -1))
    taps = math.prod(shape.kernel)
    channel, tap = np.divmod(kept, taps)
    row, column = np.divmod(tap, shape.kernel[1])
    offsets = (channel * size[0] + row * shape.dilation[0]) * size[1] + column * shape.dilation[1]
    kernel = SparseConv2d(
        batch=batch,
        channels=channels,
        filters=op.output.shape[1],
        geometry=inside,
        kept=max(1, len(values)),
        steps=kernel_steps(op),
    )
    arguments = [
        x,
        planner.constant(lambda: start),
        planner.constant(lambda: at_least_one(offsets.astype(np.int32))),
        planner.constant(lambda: at_least_one(values)),
        planner.constant(lambda: biases_of(op.bias, op.output.shape[1])),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(kernel, arguments, op.label, macs_of(op))


def place_pair(planner: CudaPlanner, op: ConvolutionPair) -> None:
    """Both convolutions in one kernel where that keeps the whole GPU busy, else one by one."""
    first = _tiled(planner, op.first)
    pair = PairKernel(first=first, second=_tiled(planner, op.second, first.tile))
    if not pair.pays:
        for one in (op.first, op.second):
            planner.note(one.label, "estimated: one by one, for more blocks at a time")
            place_convolution(planner, one)
        return
    planner.note(op.label, "estimated: both in one kernel")
    arguments = [
        planner.value(op.first.x),
        *weight_places(planner, op.first, pair.first.weights),
        *weight_places(planner, op.second, pair.second.weights),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(pair, arguments, op.label, macs_of(op.first) + macs_of(op.second))


def place_pooling(planner: CudaPlanner, op: Pooling) -> None:
    """Windows of maximum or average."""
    batch, channels, height, width = op.x.shape
    padding = (op.padding[0], 0, op.padding[1], 0)
    geometry = Geometry((height, width), op.kernel, op.stride, padding, op.dilation)
    counts = op.mode == "average" and op.count_padding
    reach = (height + op.padding[0], width + op.padding[1]) if counts else (0, 0)
    kernel = Pool2d(
        op.mode,
        batch * channels,
        geometry,
        (op.output.shape[2], op.output.shape[3]),
        reach,
        op.divisor,
        dtype_text(op.output.dtype),
    )
    planner.call(kernel, [planner.value(op.x), planner.define(op.output)], op.label)


def place_global_average(planner: CudaPlanner, op: GlobalAveragePooling) -> None:
    """One number a channel."""
    batch, channels, height, width = op.x.shape
    kernel = PlaneAverage(batch * channels, height * width)
    planner.call(kernel, [planner.value(op.x), planner.define(op.output)], op.label)


def place_concatenation(planner: CudaPlanner, op: Concatenation) -> None:
    """A copy of each part."""
    outer = math.prod(op.output.shape[: op.axis])
    whole = math.prod(op.output.shape[op.axis :])
    y, offset = planner.define(op.output), 0
    dtype = "int8" if op.output.dtype.itemsize == 1 else dtype_text(op.output.dtype)
    for part in op.parts:
        length = math.prod(part.shape[op.axis :])
        if outer * length:
            kernel = Copy(outer, length, whole, offset, dtype)
            planner.call(kernel, [planner.value(part), y], op.label)
        offset += length


def place_window(planner: CudaPlanner, op: WindowCopy) -> None:
    """Slices and paddings in one copy."""
    kernel = Window(
        op.x.shape[0],
        op.x.shape[1],
        (op.x.shape[2], op.x.shape[3]),
        op.output.shape[1],
        (op.output.shape[2], op.output.shape[3]),
        op.start,
        op.step,
        op.value,
        dtype_text(op.output.dtype),
    )
    planner.call(kernel, [planner.value(op.x), planner.define(op.output)], op.label)
