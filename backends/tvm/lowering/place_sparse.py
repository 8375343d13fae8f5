"""Planning of layers with few weights: sparse kernels where they are the faster ones."""

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from shohin.backends.tvm.kernels.block_linear import BlockSparseLinear, block_entries, pack_blocks
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.emit import LANES, Kernel, ceil_div
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.groups import GROUP_WEIGHTS
from shohin.backends.tvm.kernels.layout import Transpose
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.kernels.plane_layout import FromPlanes, ToPlanes
from shohin.backends.tvm.kernels.planes import Planes
from shohin.backends.tvm.kernels.sparse_conv2d import (
    SparseConv2d,
    SparseTile,
    needed_planes,
    pack_lists,
)
from shohin.backends.tvm.kernels.sparse_linear import SparseLinear, list_entries, pack_rows
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Convolution, Linear
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.values import kernel_steps, numpy_of, padded

_SPARSE_COST = 2.4
"""How many times as long as in a dense kernel an operation takes in a sparse one, unmeasured."""

_OPERATIONS_A_MILLISECOND = 5e7
"""Of a dense kernel, to compare what was measured with what was not."""

_ELEMENTS_A_MILLISECOND = 1e6
"""Elements that a change of layout moves."""

_ITEMS_A_THREAD = 4

_LEAST_PIXELS = 8
"""Rows from which on they are worth being treated as the pixels of an image."""


@dataclass(frozen=True)
class Comparison:
    """Times of the two ways to run a layer, in milliseconds; estimates where not measured.

    Attributes:
        dense: time of the dense kernel.
        sparse: time of the sparse kernel and of the change of layout that it needs.
        measured: whether both kernels were measured.
    """

    dense: float
    sparse: float
    measured: bool

    def text(self) -> str:
        """For people."""
        how = "measured" if self.measured else "estimated"
        return f"{how}: dense {self.dense:.3f} ms, sparse {self.sparse:.3f} ms"


def place_sparse_convolution(planner: Planner, op: Convolution, dense: Kernel) -> bool:
    """Place a convolution as a sparse one if that is faster.

    Args:
        planner: the planner.
        op: a convolution whose weight is sparse.
        dense: the kernel it would get otherwise.

    Returns:
        Whether it was placed.
    """
    if op.groups != 1:
        planner.note(op.label, "dense: a grouped convolution has no sparse kernel")
        return False
    weight = numpy_of(op.weight)
    kernel = planner.choose(_kernel(planner, op, weight), timed=True)
    comparison = _compare(planner, op, dense, kernel)
    planner.note(op.label, comparison.text())
    if comparison.sparse >= comparison.dense:
        return False
    lists = pack_lists(weight, kernel)
    arguments = [
        planner.planes(op.x, kernel.source),
        *(_constant(planner, lists[name]) for name in ("value", "distance", "start", "group")),
        planner.constant(lambda: _bias(op, kernel.filters)),
        *planner.planes_operands(op, kernel.result, kernel.filters),
        planner.define_planes(op.output, kernel.result),
    ]
    macs = kernel.nonzeros * op.output.elements // op.output.shape[1]
    planner.call(kernel, arguments, op.label, macs)
    planner.exchange(op.output, op.label)
    return True


def place_sparse_linear(
    planner: Planner, op: Linear, dense: Kernel, weight: Array, x: Placement
) -> bool:
    """Place a fully connected layer as a sparse one if that is faster.

    Args:
        planner: the planner.
        op: a layer whose weight is sparse.
        dense: the kernel it would get otherwise.
        weight: ``[N, K]``, the columns in the order of the input.
        x: the input ``[M, K]``.

    Returns:
        Whether it was placed.
    """
    rows = math.prod(op.output.shape[:-1])
    options = [
        planner.choose(kernel, timed=True) for kernel in _linear_kernels(planner, op, weight, rows)
    ]
    times = [_milliseconds(planner, kernel) for kernel in options]
    best = min(range(len(options)), key=lambda i: times[i][0])
    dense_ms, dense_known = _milliseconds(planner, dense)
    moved = 0.0
    if isinstance(options[best], SparseConv2d):
        moved = rows * sum(weight.shape) / _ELEMENTS_A_MILLISECOND
    comparison = Comparison(dense_ms, times[best][0] + moved, dense_known and times[best][1])
    planner.note(op.label, comparison.text())
    if comparison.sparse >= comparison.dense:
        return False
    _call_linear(planner, op, options[best], weight, x)
    return True


def _linear_kernels(planner: Planner, op: Linear, weight: Array, rows: int) -> list[Kernel]:
    """Every sparse form that can run the layer."""
    columns, depth = weight.shape
    steps = kernel_steps(op)
    threads = planner.target.threads
    kernels: list[Kernel] = []
    for sums in (4, 8):
        entries = list_entries(weight, sums)
        groups = _groups(entries, columns, threads)
        kernels.append(SparseLinear(rows, depth, columns, entries, groups, sums, steps))
        found = block_entries(weight, sums)
        groups = _groups(found * LANES, ceil_div(columns, LANES), threads)
        kernels.append(BlockSparseLinear(rows, depth, columns, found, groups, sums, steps))
    if rows >= _LEAST_PIXELS and all(step.operand != "full" for step in steps):
        kernels.append(_as_convolution(planner, op, weight, rows))
    return kernels


def _groups(weights: int, most: int, threads: int) -> int:
    """Work items: a few for each thread, none of them tiny."""
    if threads == 1:
        return 1
    return max(1, min(most, _ITEMS_A_THREAD * threads, weights // GROUP_WEIGHTS))


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
    return _grouped(planner, kernel)


def _call_linear(planner: Planner, op: Linear, kernel: Kernel, weight: Array, x: Placement) -> None:
    macs = int(np.count_nonzero(weight)) * math.prod(op.output.shape[:-1])
    if isinstance(kernel, SparseConv2d):
        _call_as_convolution(planner, op, kernel, (weight, x), macs)
        return
    if isinstance(kernel, BlockSparseLinear):
        lists, width = pack_blocks(weight, kernel), kernel.block_rows * LANES
    else:
        lists, width = pack_rows(weight, cast(SparseLinear, kernel)), weight.shape[0]
    arguments = [
        x,
        *(_constant(planner, lists[name]) for name in ("value", "index", "start", "group")),
        planner.constant(lambda: _bias(op, width)),
        *planner.operands(op, blocked=False, width=width),
    ]
    planner.call(kernel, [*arguments, planner.define_plain(op.output)], op.label, macs)


def _bias(op: Linear | Convolution, width: int) -> Array:
    return padded(numpy_of(op.bias) if op.bias is not None else np.zeros(0, np.float32), width)


def _call_as_convolution(
    planner: Planner,
    op: Linear,
    kernel: SparseConv2d,
    given: tuple[Array, Placement],
    macs: int,
) -> None:
    weight, x = given
    rows, columns = kernel.geometry.size[1], kernel.filters
    lists = pack_lists(weight[:, :, None, None], kernel)
    planes = planner.new_buffer(4 * math.prod(kernel.result.shape(1, columns)))
    arguments = [
        _rows_to_planes(planner, op, kernel, x),
        *(_constant(planner, lists[name]) for name in ("value", "distance", "start", "group")),
        planner.constant(lambda: _bias(op, columns)),
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


def _constant(planner: Planner, array: Array) -> Placement:
    return planner.constant(lambda: array)


def _kernel(planner: Planner, op: Convolution, weight: Array) -> SparseConv2d:
    batch, channels = op.x.shape[:2]
    window = (weight.shape[2], weight.shape[3])
    size = (op.x.shape[2], op.x.shape[3])
    geometry = Geometry(size, window, op.stride, op.padding, op.dilation)
    needed = _roomy(planner, op, needed_planes(geometry))
    kernel = SparseConv2d(
        batch=batch,
        channels=channels,
        filters=weight.shape[0],
        geometry=geometry,
        source=planner.suitable_planes(op.x, needed),
        border=max(planner.wanted_border(op.output), planner.operand_border(op)),
        nonzeros=int(np.count_nonzero(weight)),
        groups=1,
        tile=SparseTile(1, 1, channels),
        steps=kernel_steps(op),
    )
    return _grouped(planner, kernel)


def _grouped(planner: Planner, kernel: SparseConv2d) -> SparseConv2d:
    """The kernel in so many groups of filters that every thread gets a few work items."""
    favourite = kernel.variants(planner.target.registers())[0]
    threads = planner.target.threads
    items = _ITEMS_A_THREAD * threads if threads > 1 else 1
    tiles = math.prod(favourite.tiles)
    groups = min(kernel.filters, ceil_div(items, kernel.batch * tiles))
    return replace(favourite, groups=groups)


def _roomy(planner: Planner, op: Convolution, needed: Planes) -> Planes:
    """Planes with a frame that is wide enough for other readers of the image too."""
    if op.stride != (1, 1):
        return needed
    return replace(needed, border=max(needed.border, planner.wanted_border(op.x)))


def _milliseconds(planner: Planner, kernel: Kernel) -> tuple[float, bool]:
    """Time of a kernel, and whether it was measured."""
    measured = planner.tuner.milliseconds(kernel)
    if measured is not None:
        return measured, True
    dense = isinstance(kernel, (Conv2d, MatMul))
    return kernel.operations * (1.0 if dense else _SPARSE_COST) / _OPERATIONS_A_MILLISECOND, False


def _compare(planner: Planner, op: Convolution, dense: Kernel, sparse: SparseConv2d) -> Comparison:
    dense_ms, dense_known = _milliseconds(planner, dense)
    sparse_ms, sparse_known = _milliseconds(planner, sparse)
    if not planner.has_planes(op.x, sparse.source):
        sparse_ms += op.x.elements / _ELEMENTS_A_MILLISECOND
    return Comparison(dense_ms, sparse_ms, dense_known and sparse_known)
