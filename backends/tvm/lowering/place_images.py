"""Planning of operations on images: which kernel, in which layout, with which packed weights."""

import math
from dataclasses import replace

import numpy as np
import torch

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import choose_tile
from shohin.backends.tvm.kernels.depthwise import DepthwiseConv2d
from shohin.backends.tvm.kernels.emit import LANES, blocks
from shohin.backends.tvm.kernels.plane_pool import PlanePool, pools_in_planes
from shohin.backends.tvm.kernels.pool import GlobalAverage, Pool2d
from shohin.backends.tvm.kernels.window import Concat, Window
from shohin.backends.tvm.lowering.groups import merge_groups
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    Concatenation,
    Convolution,
    GlobalAveragePooling,
    Pooling,
    WindowCopy,
)
from shohin.backends.tvm.lowering.place_compressed import place_compressed_convolution
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.values import (
    bias_numbers,
    blocked_bytes,
    dtype_text,
    geometry_of,
    kernel_steps,
    macs_of,
    numpy_of,
)

_PLAIN_CHANNELS = 4
"""Most input channels read from plain layout; beyond, padding to 16 costs less than it saves."""


def place_convolution(planner: Planner, op: Convolution, timed: bool = False) -> None:
    """A convolution: depthwise, grouped in whole blocks, dense, sparse or packed as that pays.

    Args:
        planner: the planner.
        op: the convolution.
        timed: whether the time of its dense kernel was compared with that of another.
    """
    channels, filters = op.x.shape[1], op.output.shape[1]
    if op.sparse and not op.may_be_sparse:
        planner.note(op.label, "dense: a grouped convolution has no sparse kernel")
    if op.groups == channels == filters and channels > 1:
        if op.ternary is not None:
            planner.note(op.label, "dense: a depthwise convolution has no packed kernel")
        _place_depthwise(planner, op)
        return
    kernel = dense_kernel(planner, op)
    compressed = op.may_be_sparse or op.ternary is not None
    kernel = planner.choose(kernel, timed=timed or compressed)
    if compressed and place_compressed_convolution(planner, op, kernel):
        return
    arguments = [
        planner.image(op.x, plain=kernel.plain_input),
        *weight_places(planner, op, kernel),
        *planner.operands(op, blocked=True, width=kernel.filters),
        planner.define_blocked(op.output),
    ]
    planner.call(kernel, arguments, op.label, macs_of(op))


def dense_kernel(planner: Planner, op: Convolution) -> Conv2d:
    """The kernel of a convolution that is not depthwise, in any tile."""
    channels, filters = op.x.shape[1], op.output.shape[1]
    weight, groups = merge_groups(numpy_of(op.weight), op.groups, channels)
    plain = groups == 1 and channels <= _PLAIN_CHANNELS and planner.has_plain(op.x)
    padded_filters = blocks(filters) * LANES
    size, positions = _fold_pixels(planner, op, weight)
    return Conv2d(
        batch=op.x.shape[0],
        channels=channels if plain else blocks(channels) * LANES,
        filters=padded_filters,
        geometry=replace(geometry_of(op), size=size),
        groups=groups,
        plain_input=plain,
        tile=choose_tile(positions, padded_filters // LANES // groups, planner.target.registers()),
        output_blocks=planner.image_blocks(op.output),
        last_channels=0 if plain or groups > 1 else channels % LANES,
        steps=kernel_steps(op),
    )


def weight_places(planner: Planner, op: Convolution, kernel: Conv2d) -> list[Placement]:
    """Packed weights, and biases."""
    weight, _ = merge_groups(numpy_of(op.weight), op.groups, op.x.shape[1])
    return [
        planner.constant(lambda: _pack_filters(weight, kernel)),
        planner.constant(lambda: bias_numbers(op, kernel.filters)),
    ]


def _fold_pixels(planner: Planner, op: Convolution, weight: Array) -> tuple[tuple[int, int], int]:
    """Rows of a 1 x 1 convolution joined to longer ones, which fill tiles better.

    Returns:
        Height and width that the kernel sees, and output pixels in a row.
    """
    height, width = op.x.shape[2], op.x.shape[3]
    pointwise = weight.shape[2:] == (1, 1) and op.stride == (1, 1) and not any(op.padding)
    if not pointwise:
        return (height, width), op.output.shape[3]
    filter_blocks = blocks(op.output.shape[1])
    for rows in sorted(_divisors(height)):
        items = rows * max(1, filter_blocks // 4) * op.x.shape[0]
        if items >= 4 * planner.target.threads:
            return (rows, height * width // rows), height * width // rows
    return (height, width), width


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _pack_filters(weight: Array, kernel: Conv2d) -> Array:
    """``[O, C/groups, KH, KW]`` to ``[O/NR, C/16, KH, KW, 16, NR]``, zeros where ragged."""
    tiles, input_blocks, rows, columns, lanes, nr = kernel.weight_shape()
    full: Array = np.zeros((tiles * nr, input_blocks * lanes, rows, columns), np.float32)
    full[: weight.shape[0], : weight.shape[1]] = weight
    split = full.reshape(tiles, nr, input_blocks, lanes, rows, columns)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))


def _place_depthwise(planner: Planner, op: Convolution) -> None:
    channels = blocks(op.x.shape[1]) * LANES
    geometry = geometry_of(op)
    taps = geometry.kernel
    tile = choose_tile(op.output.shape[3], 1, min(12, planner.target.registers()), 1)
    kernel = planner.choose(
        DepthwiseConv2d(
            batch=op.x.shape[0],
            channels=channels,
            geometry=geometry,
            width=tile.width,
            output_blocks=planner.image_blocks(op.output),
            steps=kernel_steps(op),
        )
    )
    weight: Array = np.zeros((channels, *taps), np.float32)
    weight[: op.x.shape[1]] = numpy_of(op.weight)[:, 0]
    packed = weight.reshape(channels // LANES, LANES, *taps).transpose(0, 2, 3, 1)
    arguments = [
        planner.blocked(op.x),
        planner.constant(lambda: packed),
        planner.constant(lambda: bias_numbers(op, channels)),
        *planner.operands(op, blocked=True, width=channels),
        planner.define_blocked(op.output),
    ]
    planner.call(kernel, arguments, op.label, macs_of(op))


def place_pooling(planner: Planner, op: Pooling) -> None:
    """Windows in blocked layout, or in planes where the image is planes and they fit its tiles."""
    if _pool_planes(planner, op):
        return
    batch, channels, height, width = op.x.shape
    kernel = Pool2d(
        op.mode,
        batch,
        blocks(channels),
        (height, width),
        (op.output.shape[2], op.output.shape[3]),
        op.kernel,
        op.stride,
        op.padding,
        op.dilation,
        op.count_padding,
        op.divisor,
        planner.image_blocks(op.output),
        dtype_text(op.output.dtype),
    )
    planner.call(kernel, [planner.blocked(op.x), planner.define_blocked(op.output)], op.label)


def _pool_planes(planner: Planner, op: Pooling) -> bool:
    planes = planner.pooled_planes(op.x)
    simple = op.kernel == op.stride and not any(op.padding) and op.dilation == (1, 1)
    if planes is None or not simple or op.divisor or not planner.wants_planes(op.output):
        return False
    if not pools_in_planes(planes, op.kernel):
        return False
    batch, channels = op.x.shape[:2]
    kernel = PlanePool(op.mode, batch, channels, planes, op.kernel, border=0)
    kernel = replace(kernel, border=planner.wanted_border(op.output, kernel.result))
    arguments = [planner.planes(op.x, planes), planner.define_planes(op.output, kernel.result)]
    planner.call(kernel, arguments, op.label)
    planner.exchange(op.output, op.label)
    return True


def place_global_average(planner: Planner, op: GlobalAveragePooling) -> None:
    """One number a channel, still blocked."""
    batch, channels, height, width = op.x.shape
    kernel = GlobalAverage(batch, blocks(channels), height * width)
    planner.call(kernel, [planner.blocked(op.x), planner.define_blocked(op.output)], op.label)


def place_concatenation(planner: Planner, op: Concatenation) -> None:
    """Nothing to do where the parts are in place; else blocked along whole blocks, or plain."""
    if all(planner.is_joined(part, op.output) for part in op.parts):
        planner.define_blocked(op.output)
        return
    if _joins_planes(planner, op):
        return
    if _joins_blocks(planner, op):
        lengths = tuple(
            blocked_bytes(part) // part.dtype.itemsize // part.shape[0] for part in op.parts
        )
        places = [planner.blocked(part) for part in op.parts]
        kernel = Concat(op.output.shape[0], lengths, dtype_text(op.output.dtype))
        planner.call(kernel, [*places, planner.define_blocked(op.output)], op.label)
        return
    outer = math.prod(op.output.shape[: op.axis])
    lengths = tuple(math.prod(part.shape[op.axis :]) for part in op.parts)
    places = [planner.plain(part) for part in op.parts]
    kernel = Concat(outer, lengths, dtype_text(op.output.dtype))
    planner.call(kernel, [*places, planner.define_plain(op.output)], op.label)


def _joins_planes(planner: Planner, op: Concatenation) -> bool:
    """Join images that are planes along their channels; says whether they were."""
    planes = planner.common_planes(op.parts) if op.axis == 1 else None
    if planes is None:
        return False
    sizes = [math.prod(planes.shape(1, part.shape[1])) for part in op.parts]
    places = [planner.planes(part, planes) for part in op.parts]
    y = planner.define_planes(op.output, planes)
    planner.call(Concat(op.output.shape[0], tuple(sizes)), [*places, y], op.label)
    return True


def _joins_blocks(planner: Planner, op: Concatenation) -> bool:
    numbers = op.output.fixed or op.output.dtype == torch.float32
    return (
        len(op.output.shape) == 4
        and numbers
        and op.axis == 1
        and all(part.shape[1] % LANES == 0 for part in op.parts[:-1])
        and all(planner.has_blocked(part) for part in op.parts)
    )


def place_window(planner: Planner, op: WindowCopy) -> None:
    """Slices and paddings, one copy in blocked layout."""
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
    planner.call(kernel, [planner.blocked(op.x), planner.define_blocked(op.output)], op.label)
