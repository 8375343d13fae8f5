"""Planning of convolutions with few weights by their sparse kernel.

What changes of layout take before and after a layer belongs to its cost.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from shohin.backends.tvm.kernels.emit import ceil_div
from shohin.backends.tvm.kernels.list_layout import ListLayout
from shohin.backends.tvm.kernels.planes import Planes
from shohin.backends.tvm.kernels.sparse_conv2d import (
    SparseConv2d,
    SparseTile,
    needed_planes,
)
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Convolution
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, kernel_cost
from shohin.backends.tvm.lowering.values import bias_numbers, geometry_of, kernel_steps, numpy_of

ITEMS_A_THREAD = 4
"""Work items of a kernel, so that threads that finish early find more to do."""


def sparse_convolution(planner: Planner, op: Convolution) -> Candidate:
    """A convolution without groups, whose weight is sparse, as a sparse one."""
    weight = numpy_of(op.weight)
    kernel = planner.choose(_kernel(planner, op, weight), timed=True)
    moved = 0 if planner.has_planes(op.x, kernel.source) else op.x.elements
    moved += planner.moved_for_readers(op.output, planes=True)
    return Candidate(
        kernel_cost(planner, kernel, moved), lambda: _call(planner, op, kernel, weight)
    )


def _call(planner: Planner, op: Convolution, kernel: SparseConv2d, weight: Array) -> None:
    arguments = [
        planner.planes(op.x, kernel.source),
        *convolution_lists(planner, weight, kernel),
        planner.constant(lambda: bias_numbers(op, kernel.filters)),
        *planner.planes_operands(op, kernel.result, kernel.filters),
        planner.define_planes(op.output, kernel.result),
    ]
    macs = kernel.nonzeros * op.output.elements // op.output.shape[1]
    planner.call(kernel, arguments, op.label, macs)
    planner.exchange(op.output, op.label)


def _kernel(planner: Planner, op: Convolution, weight: Array) -> SparseConv2d:
    batch, channels = op.x.shape[:2]
    geometry = geometry_of(op)
    needed = _roomy(planner, op, needed_planes(geometry))
    kernel = SparseConv2d(
        batch=batch,
        channels=channels,
        filters=weight.shape[0],
        geometry=geometry,
        source=planner.suitable_planes(op.x, needed),
        border=0,
        nonzeros=int(np.count_nonzero(weight)),
        groups=1,
        tile=SparseTile(1, 1, channels),
        steps=kernel_steps(op),
    )
    wanted = planner.wanted_border(op.output, kernel.result)
    border = max(wanted, planner.operand_border(op, kernel.result))
    return in_groups(planner, replace(kernel, border=border))


def _roomy(planner: Planner, op: Convolution, needed: Planes) -> Planes:
    """Planes with a frame that is wide enough for other readers of the image too."""
    return replace(needed, border=planner.wanted_border(op.x, needed))


def in_groups(planner: Planner, kernel: SparseConv2d) -> SparseConv2d:
    """The kernel in so many groups of filters that every thread gets a few work items."""
    favourite = kernel.variants(planner.target.registers())[0]
    threads = planner.target.threads
    items = ITEMS_A_THREAD * threads if threads > 1 else 1
    tiles = math.prod(favourite.tiles)
    groups = min(kernel.filters, ceil_div(items, kernel.batch * tiles))
    return replace(favourite, groups=groups)


def convolution_lists(planner: Planner, weight: Array, kernel: SparseConv2d) -> list[Placement]:
    """``[O, C, KH, KW]`` weights as the lists that a convolution reads."""
    names = ("value", "distance", "start", "group")
    return list_places(planner, names, lambda: kernel.pack(weight), kernel.layout)


def list_places(
    planner: Planner,
    names: Sequence[str],
    pack: Callable[[], Mapping[str, Array]],
    layout: ListLayout,
) -> list[Placement]:
    """Constants that are made together: once, and only when constants are really written.

    Args:
        planner: the planner.
        names: which, in the order of the kernel's parameters: values, their places, starts.
        pack: gives the arrays by name.
        layout: how the second follows from which weights are kept.
    """
    packed = functools.cache(pack)
    placed = [planner.constant(functools.partial(_named, packed, name)) for name in names]
    planner.constants.mark_lists(placed[1], placed[2], layout)
    return placed


def _named(packed: Callable[[], Mapping[str, Array]], name: str) -> Array:
    return packed()[name]
