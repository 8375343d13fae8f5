"""Planning of fixed-point operations: which kernel, in which layout, with which packed weights."""

import math

import numpy as np
import torch

from shohin.backends.tvm.kernels.conv_tiles import choose_tile
from shohin.backends.tvm.kernels.depthwise import DepthwiseConv2d
from shohin.backends.tvm.kernels.dots import DotUnit, unit_of
from shohin.backends.tvm.kernels.emit import LANES, blocks
from shohin.backends.tvm.kernels.fixed_average import FixedAverage as AverageKernel
from shohin.backends.tvm.kernels.fixed_conv2d import FixedConv2d, chain_length, conv_chain
from shohin.backends.tvm.kernels.fixed_linear import FixedLinear as LinearKernel
from shohin.backends.tvm.kernels.fixed_linear import fixed_tile_options
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.layout import ToBlocked
from shohin.backends.tvm.lowering.groups import merge_groups
from shohin.backends.tvm.lowering.operations import (
    Array,
    Elementwise,
    FixedAverage,
    FixedConvolution,
    FixedLinear,
    FixedWeights,
    Pooling,
    Value,
)
from shohin.backends.tvm.lowering.place_fixed_ternary import (
    place_ternary_convolution,
    place_ternary_linear,
)
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.values import (
    dtype_text,
    kernel_steps,
    numpy_of,
    padded,
)

_HALF_BYTE, _BYTE = 4, 8


def place_convolution(planner: Planner, op: FixedConvolution) -> None:
    """A convolution of integers: depthwise, grouped in whole blocks, or of all channels."""
    channels, filters = op.x.shape[1], op.output.shape[1]
    if op.groups == channels == filters and channels > 1 and not op.weights.wide:
        _place_depthwise(planner, op)
        return
    weight, groups = merge_groups(numpy_of(op.weights.codes), op.groups, channels)
    unit, padded_filters = _unit(planner, op.x, op.weights), blocks(filters) * LANES
    geometry = _geometry(op)
    signed = not op.x.nonnegative
    tile = choose_tile(
        geometry.output_size[1],
        padded_filters // LANES // groups,
        _registers(planner, unit),
    )
    plain = FixedConv2d(
        batch=op.x.shape[0],
        channels=blocks(channels) * LANES,
        filters=padded_filters,
        geometry=geometry,
        groups=groups,
        unit=unit,
        signed=signed,
        result=dtype_text(op.output.dtype),
        tile=tile,
        chain=conv_chain(unit, weight, signed),
        wide=op.weights.wide,
        source=dtype_text(op.x.dtype),
        weight_type=dtype_text(op.weights.codes.dtype),
        steps=kernel_steps(op),
        output_blocks=planner.image_blocks(op.output),
        last_channels=0 if groups > 1 else channels % LANES,
    )
    if place_ternary_convolution(planner, op, plain, weight):
        return
    kernel = planner.choose(plain)
    biases = numpy_of(op.weights.biases)
    planner.narrow |= op.weights.bits < _BYTE
    arguments = [
        planner.blocked(op.x),
        planner.constant(lambda: kernel.pack(weight)),
        planner.constant(lambda: kernel.biases(weight, biases)),
        *planner.operands(op, blocked=True, width=padded_filters),
        planner.define_blocked(op.output),
    ]
    macs = op.output.elements * math.prod(op.weights.codes.shape[1:])
    planner.call(kernel, arguments, op.label, macs)


def _unit(planner: Planner, x: Value, weights: FixedWeights) -> DotUnit:
    words = torch.int16 in (x.dtype, weights.codes.dtype) or weights.wide
    return unit_of(planner.target, words=words)


def _registers(planner: Planner, unit: DotUnit) -> int:
    """Vectors of 16 sums and weights that registers hold, products beside them."""
    return max(2, planner.target.registers() - (1 if unit.lanes == LANES else 2))


def _geometry(op: FixedConvolution) -> Geometry:
    rows, columns = (int(size) for size in op.weights.codes.shape[2:])
    height, width = op.x.shape[2:]
    return Geometry((height, width), (rows, columns), op.stride, op.padding, op.dilation)


def _place_depthwise(planner: Planner, op: FixedConvolution) -> None:
    channels, geometry = blocks(op.x.shape[1]) * LANES, _geometry(op)
    tile = choose_tile(geometry.output_size[1], 1, min(12, planner.target.registers()), 1)
    codes = numpy_of(op.weights.codes)
    kernel = planner.choose(
        DepthwiseConv2d(
            batch=op.x.shape[0],
            channels=channels,
            geometry=geometry,
            width=tile.width,
            steps=kernel_steps(op),
            output_blocks=planner.image_blocks(op.output),
            source=dtype_text(op.x.dtype),
            weight_type=dtype_text(op.weights.codes.dtype),
            sum_type="int32",
            result=dtype_text(op.output.dtype),
        )
    )
    weight = np.zeros((channels, *geometry.kernel), codes.dtype)
    weight[: len(codes)] = codes[:, 0]
    packed = weight.reshape(channels // LANES, LANES, *geometry.kernel).transpose(0, 2, 3, 1)
    biases = numpy_of(op.weights.biases).astype(np.int32)
    planner.narrow |= op.weights.bits < _BYTE
    arguments = [
        planner.blocked(op.x),
        planner.constant(lambda: packed),
        planner.constant(lambda: padded(biases, channels)),
        *planner.operands(op, blocked=True, width=channels),
        planner.define_blocked(op.output),
    ]
    macs = op.output.elements * math.prod(geometry.kernel)
    planner.call(kernel, arguments, op.label, macs)


def place_linear(planner: Planner, op: FixedLinear) -> None:
    """A fully connected layer of integers; one behind a flattened image takes it as it lies."""
    image = planner.flattened_image(op.x)
    # Columns for channels that are not there would be stored as well.
    image = image if image is not None and image.shape[1] % LANES == 0 else None
    x = planner.plain(op.x) if image is None else planner.blocked(image)
    weight = numpy_of(op.weights.codes)
    if image is not None:
        weight = _in_order_of(image, weight)
    unit, signed = _unit(planner, op.x, op.weights), not op.x.nonnegative
    rows, (columns, depth) = math.prod(op.output.shape[:-1]), weight.shape
    half_bytes = op.weights.bits <= _HALF_BYTE and unit.group == 4 and not op.weights.wide
    plain = LinearKernel(
        rows,
        depth,
        columns,
        unit,
        signed,
        dtype_text(op.output.dtype),
        fixed_tile_options(rows, columns, _registers(planner, unit))[0],
        chain=1 if half_bytes else _linear_chain(unit, weight, signed),
        wide=op.weights.wide,
        source=dtype_text(op.x.dtype),
        weight_type=dtype_text(op.weights.codes.dtype),
        half_bytes=half_bytes,
        steps=kernel_steps(op),
    )
    if place_ternary_linear(planner, op, plain, x, weight):
        return
    kernel = planner.choose(plain)
    biases = numpy_of(op.weights.biases)
    planner.narrow |= op.weights.bits < (_HALF_BYTE if half_bytes else _BYTE)
    arguments = [
        x,
        planner.constant(lambda: kernel.pack(weight)),
        planner.constant(lambda: kernel.biases(weight, biases)),
        *planner.operands(op, blocked=False, width=kernel.padded_columns),
        planner.define_plain(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * depth)


def _linear_chain(unit: DotUnit, weight: Array, signed: bool) -> int:
    if not unit.chains:
        return 1
    full = np.zeros((len(weight), blocks(weight.shape[1]) * LANES), weight.dtype)
    full[:, : weight.shape[1]] = weight
    return chain_length(full.reshape(len(weight), -1, LANES), unit.group, signed)


def _in_order_of(image: Value, weight: Array) -> Array:
    """Columns in the order of a blocked image; columns of missing channels are zero."""
    _, channels, height, width = image.shape
    count = blocks(channels)
    full = np.zeros((len(weight), count * LANES, height * width), weight.dtype)
    full[:, :channels] = weight.reshape(len(weight), channels, height * width)
    split = full.reshape(len(weight), count, LANES, height * width)
    return split.transpose(0, 1, 3, 2).reshape(len(weight), -1)


def place_average(planner: Planner, op: FixedAverage) -> None:
    """Averages over windows, in blocked layout."""
    batch, channels, height, width = op.x.shape
    kernel = AverageKernel(
        batch,
        blocks(channels),
        Geometry((height, width), op.kernel, op.stride, op.padding),
        op.multiplier,
        dtype_text(op.x.dtype),
        dtype_text(op.output.dtype),
        op.x.dtype == torch.int16,
        kernel_steps(op),
        planner.image_blocks(op.output),
    )
    planner.call(kernel, [planner.blocked(op.x), planner.define_blocked(op.output)], op.label)


def place_quantized_image(planner: Planner, op: Elementwise) -> bool:
    """Round a plain image straight into blocked layout, if that is what its readers want."""
    wanted = (FixedConvolution, FixedAverage, Pooling)
    image = len(op.x.shape) == 4 and op.output.fixed and not op.x.fixed
    if not image or planner.has_blocked(op.x) or not planner.is_read_by(op.output, wanted):
        return False
    if any(step.operand is not None for step in op.steps):
        return False
    batch, channels, height, width = op.x.shape
    kernel = ToBlocked(
        batch,
        channels,
        height * width,
        dtype_text(op.x.dtype),
        dtype_text(op.output.dtype),
        kernel_steps(op),
    )
    planner.call(kernel, [planner.plain(op.x), planner.define_blocked(op.output)], op.label)
    return True
