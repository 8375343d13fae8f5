"""Planning of matrix products, normalisations, element-wise chains, views and regions."""

import math
from functools import partial

import numpy as np

from shohin.backends.tvm.kernels.emit import LANES, blocks
from shohin.backends.tvm.kernels.indexed_linear import Rows
from shohin.backends.tvm.kernels.layout import Transpose
from shohin.backends.tvm.kernels.matmul import MatMul, choose_matrix_tile
from shohin.backends.tvm.kernels.normalise import LayerNorm, Softmax
from shohin.backends.tvm.kernels.pointwise import Pointwise
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    BatchedMatMul,
    Elementwise,
    LayerNormalisation,
    Linear,
    SoftmaxRows,
    Value,
    View,
)
from shohin.backends.tvm.lowering.place_compressed import place_compressed_linear
from shohin.backends.tvm.lowering.place_fixed import place_quantized_image
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.values import (
    affine_numbers,
    bias_numbers,
    blocked_bytes,
    dtype_text,
    kernel_steps,
    numpy_of,
)


def place_linear(planner: Planner, op: Linear) -> None:
    """A fully connected layer; one behind a flattened image takes the image as it lies."""
    weight = numpy_of(op.weight)
    image = planner.flattened_image(op.x)
    x = planner.plain(op.x) if image is None else planner.blocked(image)
    columns = weight.shape[0]
    depth = weight.shape[1] if image is None else blocked_bytes(image) // 4 // image.shape[0]
    rows = math.prod(op.output.shape[:-1])
    tile = choose_matrix_tile(rows, columns, planner.target.registers())
    kernel = planner.choose(
        MatMul(1, rows, depth, columns, True, op.bias is not None, tile, steps=kernel_steps(op)),
        timed=op.is_compressed,
    )
    ordered = partial(_in_order_of, image)
    if op.is_compressed and place_compressed_linear(planner, op, kernel, ordered, x):
        return
    arguments = [x, planner.constant(lambda: _pack_rows(ordered(weight), kernel))]
    if op.bias is not None:
        arguments.append(planner.constant(lambda: bias_numbers(op, kernel.padded_columns)))
    arguments += planner.operands(op, blocked=False, width=kernel.padded_columns)
    macs = op.output.elements * int(op.weight.shape[1])
    planner.call(kernel, [*arguments, planner.define_plain(op.output)], op.label, macs)


def _in_order_of(image: Value | None, weight: Array) -> Rows:
    """Some rows of a weight, the columns in the order of the image if there is one."""

    def rows(start: int, stop: int) -> Array:
        part = weight[start:stop]
        return part if image is None else _permute_columns(part, image)

    return rows


def _permute_columns(rows: Array, image: Value) -> Array:
    """Columns in the order of a blocked image; columns of missing channels are zero."""
    _, channels, height, width = image.shape
    count = blocks(channels)
    full: Array = np.zeros((rows.shape[0], count * LANES, height * width), np.float32)
    full[:, :channels] = rows.reshape(rows.shape[0], channels, height * width)
    split = full.reshape(rows.shape[0], count, LANES, height * width)
    return split.transpose(0, 1, 3, 2).reshape(rows.shape[0], -1)


def _pack_rows(weight: Rows, kernel: MatMul) -> Array:
    """``[N, K]`` to ``[N/NR, K, NR]``, zeros where ragged.

    Done a tile at a time: the weights of one layer can be most of a model.
    """
    tiles, depth, nr = kernel.weight_shape()
    packed: Array = np.zeros((tiles, depth, nr), np.float32)
    for tile in range(tiles):
        rows = weight(tile * nr, (tile + 1) * nr)
        packed[tile, :, : rows.shape[0]] = rows.T
    return packed


def place_batched_matmul(planner: Planner, op: BatchedMatMul) -> None:
    """A product of two computed arrays."""
    batch = math.prod(op.output.shape[:-2])
    rows, columns = op.output.shape[-2:]
    depth = op.a.shape[-1]
    b = planner.plain(op.b)
    if op.transpose_b:
        b = _transposed(planner, op, b, (batch, columns, depth))
    tile = choose_matrix_tile(rows, columns, planner.target.registers())
    kernel = planner.choose(
        MatMul(
            batch,
            rows,
            depth,
            columns,
            False,
            False,
            tile,
            op.scale,
            kernel_steps(op),
        )
    )
    operands = planner.operands(op, blocked=False, width=kernel.padded_columns)
    arguments = [planner.plain(op.a), b, *operands, planner.define_plain(op.output)]
    planner.call(kernel, arguments, op.label, op.output.elements * depth)


def _transposed(
    planner: Planner, op: BatchedMatMul, b: Placement, shape: tuple[int, int, int]
) -> Placement:
    y = planner.new_buffer(op.b.bytes)
    planner.call(Transpose(*shape), [b, y], f"{op.label}: transpose")
    return y


def place_elementwise(planner: Planner, op: Elementwise) -> None:
    """A chain that no producer took, in the layout its input has."""
    shape = op.x.shape
    image = len(shape) == 4
    if place_quantized_image(planner, op):
        return
    kinds = dtype_text(op.x.dtype), dtype_text(op.output.dtype)
    if image and planner.has_blocked(op.x):
        count, pixels = blocks(shape[1]), shape[2] * shape[3]
        kernel = Pointwise(shape[0], count, pixels * LANES, "lanes", kernel_steps(op), *kinds)
        x = planner.blocked(op.x)
        operands = planner.operands(op, blocked=True, width=count * LANES)
        planner.call(kernel, [x, *operands, planner.define_blocked(op.output)], op.label)
        return
    if image:
        pixels = shape[2] * shape[3]
        kernel = Pointwise(shape[0], shape[1], pixels, "rows", kernel_steps(op), *kinds)
    else:
        width = shape[-1] if shape else 1
        kernel = Pointwise(math.prod(shape[:-1]), 1, width, "inner", kernel_steps(op), *kinds)
    x = planner.plain(op.x)
    width = shape[1] if image else kernel.inner
    operands = planner.operands(op, blocked=False, width=width)
    planner.call(kernel, [x, *operands, planner.define_plain(op.output)], op.label)


def place_softmax(planner: Planner, op: SoftmaxRows) -> None:
    """Rows of the last axis."""
    columns = op.x.shape[-1]
    kernel = Softmax(op.x.elements // max(1, columns), columns, op.logarithm)
    planner.call(kernel, [planner.plain(op.x), planner.define_plain(op.output)], op.label)


def place_layer_norm(planner: Planner, op: LayerNormalisation) -> None:
    """Rows of the normalised axes."""
    numbers = affine_numbers(op)
    kernel = LayerNorm(op.x.elements // op.columns, op.columns, op.epsilon, bool(numbers))
    places = [planner.constant(partial(np.asarray, one)) for one in numbers]
    x = planner.plain(op.x)
    planner.call(kernel, [x, *places, planner.define_plain(op.output)], op.label)


def place_view(planner: Planner, op: View) -> None:
    """Nothing to compute; where the elements lie is found out when they are read."""
    planner.define_view(op.output, op.x, op.offset)
