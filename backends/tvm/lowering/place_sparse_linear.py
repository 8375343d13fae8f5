"""Planning of fully connected layers with few weights: the fastest of their sparse kernels."""

import math

import numpy as np

from shohin.backends.tvm.kernels.block_linear import BlockSparseLinear
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.groups import GROUP_WEIGHTS, filled_entries
from shohin.backends.tvm.kernels.layout import Transpose
from shohin.backends.tvm.kernels.list_linear import ListLinear
from shohin.backends.tvm.kernels.plane_layout import FromPlanes, ToPlanes
from shohin.backends.tvm.kernels.sparse_conv2d import SparseConv2d, SparseTile, needed_planes
from shohin.backends.tvm.kernels.sparse_linear import SparseLinear
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Linear
from shohin.backends.tvm.lowering.place_sparse import (
    ITEMS_A_THREAD,
    convolution_lists,
    in_groups,
    list_places,
)
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, kernel_cost
from shohin.backends.tvm.lowering.values import bias_numbers, kernel_steps

_LEAST_PIXELS = 8
"""Rows from which on they are worth being treated as the pixels of an image."""

_SUMS = (4, 8)
"""Independent sums of an output that are tried."""


def sparse_candidate(planner: Planner, op: Linear, weight: Array, x: Placement) -> Candidate:
    """The fastest sparse form of a fully connected layer.

    Args:
        planner: the planner.
        op: a layer whose weight is sparse.
        weight: ``[N, K]``, the columns in the order of the input.
        x: the input ``[M, K]``.
    """
    rows = math.prod(op.output.shape[:-1])
    options = [planner.choose(kernel, timed=True) for kernel in _kernels(planner, op, weight, rows)]
    moved = rows * sum(weight.shape)
    costs = [kernel_cost(planner, k, moved if isinstance(k, SparseConv2d) else 0) for k in options]
    best = min(range(len(options)), key=lambda i: costs[i].milliseconds)
    return Candidate(costs[best], lambda: _call(planner, op, options[best], weight, x))


def _kernels(
    planner: Planner, op: Linear, weight: Array, rows: int
) -> list[ListLinear | SparseConv2d]:
    """Every sparse form that can run the layer."""
    kernels: list[ListLinear | SparseConv2d] = []
    columns, depth = weight.shape
    families: tuple[type[ListLinear], ...] = (SparseLinear, BlockSparseLinear)
    for family in families:
        counts = family.counts(weight)
        for sums in _SUMS:
            entries = filled_entries(counts, sums)
            groups = _groups(entries * family.lanes, counts.shape[-1], planner.target.threads)
            kernels.append(family(rows, depth, columns, entries, groups, sums, kernel_steps(op)))
    if rows >= _LEAST_PIXELS and all(step.step.operand != "full" for step in op.steps):
        kernels.append(_as_convolution(planner, op, weight, rows))
    return kernels


def _groups(weights: int, most: int, threads: int) -> int:
    """Work items: a few for each thread, none of them tiny."""
    if threads == 1:
        return 1
    return max(1, min(most, ITEMS_A_THREAD * threads, weights // GROUP_WEIGHTS))


def _as_convolution(planner: Planner, op: Linear, weight: Array, rows: int) -> SparseConv2d:
    """A layer over many rows as a 1 x 1 convolution whose pixels are the rows."""
    columns, depth = weight.shape
    geometry = Geometry((1, rows), (1, 1))
    kernel = SparseConv2d(
        batch=1,
        channels=depth,
        filters=columns,
        geometry=geometry,
        source=needed_planes(geometry),
        border=0,
        nonzeros=int(np.count_nonzero(weight)),
        groups=1,
        tile=SparseTile(1, 1, depth),
        steps=kernel_steps(op),
    )
    return in_groups(planner, kernel)


def _call(
    planner: Planner,
    op: Linear,
    kernel: ListLinear | SparseConv2d,
    weight: Array,
    x: Placement,
) -> None:
    macs = int(np.count_nonzero(weight)) * math.prod(op.output.shape[:-1])
    if isinstance(kernel, SparseConv2d):
        _call_as_convolution(planner, op, kernel, (weight, x), macs)
        return
    names = ("value", "index", "start", "group")
    arguments = [
        x,
        *list_places(planner, names, lambda: kernel.pack(weight), kernel.layout),
        planner.constant(lambda: bias_numbers(op, kernel.width)),
        *planner.operands(op, blocked=False, width=kernel.width),
    ]
    planner.call(kernel, [*arguments, planner.define_plain(op.output)], op.label, macs)


def _call_as_convolution(
    planner: Planner,
    op: Linear,
    kernel: SparseConv2d,
    given: tuple[Array, Placement],
    macs: int,
) -> None:
    weight, x = given
    rows, columns = kernel.geometry.size[1], kernel.filters
    planes = planner.new_buffer(4 * math.prod(kernel.result.shape(1, columns)))
    arguments = [
        _rows_to_planes(planner, op, kernel, x),
        *convolution_lists(planner, weight[:, :, None, None], kernel),
        planner.constant(lambda: bias_numbers(op, columns)),
        *planner.operands(op, blocked=False, width=columns),
    ]
    planner.call(kernel, [*arguments, planes], op.label, macs)
    pixels = planner.new_buffer(4 * rows * columns)
    back = FromPlanes(1, columns, kernel.result, "plain")
    planner.call(back, [planes, pixels], f"{op.label}: from planes")
    result = planner.define_plain(op.output)
    planner.call(Transpose(1, columns, rows), [pixels, result], f"{op.label}: transpose")


def _rows_to_planes(planner: Planner, op: Linear, kernel: SparseConv2d, x: Placement) -> Placement:
    """``[M, K]`` as planes: every input a channel, every row a pixel."""
    rows = kernel.geometry.size[1]
    pixels = planner.new_buffer(4 * rows * kernel.channels)
    planner.call(Transpose(1, rows, kernel.channels), [x, pixels], f"{op.label}: transpose")
    planes = planner.new_buffer(4 * math.prod(kernel.source.shape(1, kernel.channels)))
    there = ToPlanes(1, kernel.channels, kernel.source, "plain")
    planner.call(there, [pixels, planes], f"{op.label}: to planes")
    return planes
