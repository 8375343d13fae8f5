"""Planning of matrix products, normalisations and chains of steps."""

import math
from functools import partial
from typing import Literal

import numpy as np

from shohin.backends.tvm.cuda.kernels.layers import Linear as LinearKernel
from shohin.backends.tvm.cuda.kernels.layers import MatMul
from shohin.backends.tvm.cuda.kernels.points import Elementwise as ElementwiseKernel
from shohin.backends.tvm.cuda.kernels.rows import LayerNorm, Softmax
from shohin.backends.tvm.cuda.kernels.tiles import choose_tile
from shohin.backends.tvm.cuda.kernels.vectors import (
    MOST_ROWS,
    SparseVectorProduct,
    VectorForm,
    VectorProduct,
)
from shohin.backends.tvm.cuda.kernels.weights import Weights
from shohin.backends.tvm.cuda.lowering.planner import CudaPlanner
from shohin.backends.tvm.cuda.lowering.weights import (
    at_least_one,
    biases_of,
    float_form,
    float_unit,
    lists_of,
    weight_places,
)
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    BatchedMatMul,
    Elementwise,
    LayerNormalisation,
    Linear,
    SoftmaxRows,
    View,
)
from shohin.backends.tvm.lowering.values import affine_numbers, dtype_text, kernel_steps, numpy_of

_WORTH_LISTS = 0.4
"""Density of weights up to which lists take less memory than all of them, and so less time."""

_HALF_BYTE, _BYTE = 16, 256
"""Values of a codebook that indices of four and of eight bits tell apart."""


def place_linear(planner: CudaPlanner, op: Linear) -> None:
    """A fully connected layer: a warp for every output where there are few rows, else in tiles."""
    rows = math.prod(op.output.shape[:-1])
    if rows > MOST_ROWS:
        _place_tiles(planner, op, rows)
        return
    density = float(op.weight.count_nonzero()) / max(1, op.weight.numel())
    if op.sparse and op.ternary is None and density <= _WORTH_LISTS:
        planner.note(op.label, f"estimated: lists, density {density:.2f}")
        _place_lists(planner, op, rows)
        return
    form, book = _form(op)
    if form != "float":
        planner.note(op.label, f"estimated: {form} weights")
    depth, outputs = int(op.weight.shape[1]), int(op.weight.shape[0])
    kernel = VectorProduct(form, rows, depth, outputs, len(book), kernel_steps(op))
    arguments = [
        planner.value(op.x),
        *_vector_weights(planner, op, kernel, book),
        planner.constant(lambda: biases_of(op.bias, outputs)),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * depth)


def _form(op: Linear) -> tuple[VectorForm, Array]:
    """How the weights are kept, and the values of their codebook."""
    none: Array = np.zeros(0, np.float32)
    if op.ternary is not None:
        return "ternary-float", none
    if op.values is None:
        return "float", none
    book = np.unique(numpy_of(op.values))
    if len(book) > _BYTE:
        return "float", none
    return ("codebook-4" if len(book) <= _HALF_BYTE else "codebook-8"), book


def _vector_weights(
    planner: CudaPlanner, op: Linear, kernel: VectorProduct, book: Array
) -> list[Placement]:
    weight, ternary = op.weight, op.ternary
    if ternary is not None:
        return [
            planner.constant(lambda: kernel.pack(numpy_of(ternary.codes))),
            planner.constant(lambda: kernel.pack_values(numpy_of(ternary.values))),
        ]
    if not len(book):
        return [planner.constant(lambda: kernel.pack(numpy_of(weight)))]
    return [
        planner.constant(lambda: kernel.pack(np.searchsorted(book, numpy_of(weight)))),
        planner.constant(lambda: book),
    ]


def _place_lists(planner: CudaPlanner, op: Linear, rows: int) -> None:
    outputs, depth = (int(size) for size in op.weight.shape)
    start, columns, values = lists_of(numpy_of(op.weight))
    index: Literal["uint16", "int32"] = "uint16" if depth <= 1 << 16 else "int32"
    kernel = SparseVectorProduct(rows, depth, outputs, max(1, len(values)), index, kernel_steps(op))
    arguments = [
        planner.value(op.x),
        planner.constant(lambda: start),
        planner.constant(lambda: at_least_one(columns.astype(index))),
        planner.constant(lambda: at_least_one(values)),
        planner.constant(lambda: biases_of(op.bias, outputs)),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * depth)


def _place_tiles(planner: CudaPlanner, op: Linear, rows: int) -> None:
    if op.sparse or op.values is not None:
        planner.note(op.label, f"dense: {rows} rows share the weights")
    unit = float_unit(planner)
    outputs, depth = (int(size) for size in op.weight.shape)
    tile = choose_tile(unit, outputs, rows, 1)
    weights = Weights(float_form(op), 1, outputs, depth, tile)
    kernel = LinearKernel(
        unit=unit, tile=tile, weights=weights, inputs=rows, steps=kernel_steps(op)
    )
    arguments = [
        planner.value(op.x),
        *weight_places(planner, op, weights),
        *planner.operands(op),
        planner.define(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * depth)


def place_batched_matmul(planner: CudaPlanner, op: BatchedMatMul) -> None:
    """A product of two computed arrays."""
    batch = math.prod(op.output.shape[:-2])
    rows, columns = op.output.shape[-2:]
    depth, unit = op.a.shape[-1], float_unit(planner)
    kernel = MatMul(
        unit=unit,
        tile=choose_tile(unit, rows, columns, batch),
        batch=batch,
        rows=rows,
        columns=columns,
        depth=depth,
        transposed=op.transpose_b,
        scale=op.scale,
        steps=kernel_steps(op),
    )
    factors = [planner.value(op.a), planner.value(op.b)]
    arguments = [*factors, *planner.operands(op), planner.define(op.output)]
    planner.call(kernel, arguments, op.label, op.output.elements * depth)


def place_elementwise(planner: CudaPlanner, op: Elementwise) -> None:
    """A chain that no producer took."""
    shape = op.x.shape
    if len(shape) == 4:
        sizes = (shape[0], shape[1], shape[2] * shape[3])
    else:
        sizes = (math.prod(shape[:-1]), shape[-1] if shape else 1, 1)
    kinds = dtype_text(op.x.dtype), dtype_text(op.output.dtype)
    kernel = ElementwiseKernel(*sizes, kernel_steps(op), *kinds)
    arguments = [planner.value(op.x), *planner.operands(op), planner.define(op.output)]
    planner.call(kernel, arguments, op.label)


def place_softmax(planner: CudaPlanner, op: SoftmaxRows) -> None:
    """Rows of the last axis."""
    columns = op.x.shape[-1]
    kernel = Softmax(op.x.elements // max(1, columns), columns, op.logarithm)
    planner.call(kernel, [planner.value(op.x), planner.define(op.output)], op.label)


def place_layer_norm(planner: CudaPlanner, op: LayerNormalisation) -> None:
    """Rows of the normalised axes."""
    numbers = affine_numbers(op)
    kernel = LayerNorm(op.x.elements // op.columns, op.columns, op.epsilon, bool(numbers))
    places = [planner.constant(partial(np.asarray, one)) for one in numbers]
    arguments = [planner.value(op.x), *places, planner.define(op.output)]
    planner.call(kernel, arguments, op.label)


def place_view(planner: CudaPlanner, op: View) -> None:
    """The elements where they lie."""
    planner.view(op.output, op.x, op.offset)
