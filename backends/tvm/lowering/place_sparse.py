"""Planning of layers with few weights: sparse kernels where they are the faster ones."""

from dataclasses import dataclass, replace

import numpy as np

from shohin.backends.tvm.kernels.emit import Kernel, ceil_div
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.planes import Planes
from shohin.backends.tvm.kernels.sparse_conv2d import (
    SparseConv2d,
    SparseTile,
    needed_planes,
    pack_lists,
)
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Convolution
from shohin.backends.tvm.lowering.plan import Planner, kernel_steps, numpy_of, padded

_SPARSE_COST = 2.4
"""How many times as long as in a dense kernel an operation takes in a sparse one, unmeasured."""

_OPERATIONS_A_MILLISECOND = 5e7
"""Of a dense kernel, to compare what was measured with what was not."""

_ELEMENTS_A_MILLISECOND = 1e6
"""Elements that a change of layout moves."""

_ITEMS_A_THREAD = 4


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
    kernel = planner.choose(_kernel(planner, op, weight))
    comparison = _compare(planner, op, dense, kernel)
    planner.note(op.label, comparison.text())
    if comparison.sparse >= comparison.dense:
        return False
    lists = pack_lists(weight, kernel)
    bias = numpy_of(op.bias) if op.bias is not None else np.zeros(0, np.float32)
    arguments = [
        planner.planes(op.x, kernel.source),
        *(_constant(planner, lists[name]) for name in ("value", "distance", "start", "group")),
        planner.constant(lambda: padded(bias, kernel.filters)),
        *planner.planes_operands(op, kernel.result, kernel.filters),
        planner.define_planes(op.output, kernel.result),
    ]
    macs = kernel.nonzeros * op.output.elements // op.output.shape[1]
    planner.call(kernel, arguments, op.label, macs)
    return True


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
        border=planner.wanted_border(op.output),
        nonzeros=int(np.count_nonzero(weight)),
        groups=1,
        tile=SparseTile(1, channels),
        steps=kernel_steps(op),
    )
    favourite = kernel.variants(planner.target.registers())[0]
    items = _ITEMS_A_THREAD * planner.target.threads if planner.target.threads > 1 else 1
    groups = min(kernel.filters, ceil_div(items, batch * favourite.tiles))
    return replace(favourite, groups=groups)


def _roomy(planner: Planner, op: Convolution, needed: Planes) -> Planes:
    """Planes with the zeros that other readers of the image, and of the result, will want too."""
    if op.stride != (1, 1):
        return needed
    border = max(needed.border, planner.wanted_border(op.x))
    gap = max(planner.wanted_border(op.x), planner.wanted_border(op.output))
    return replace(needed, border=border, pitch=max(needed.pitch, needed.size[1] + gap))


def _compare(planner: Planner, op: Convolution, dense: Kernel, sparse: SparseConv2d) -> Comparison:
    times = [planner.tuner.milliseconds(kernel) for kernel in (dense, sparse)]
    dense_ms = dense.operations / _OPERATIONS_A_MILLISECOND
    sparse_ms = sparse.operations * _SPARSE_COST / _OPERATIONS_A_MILLISECOND
    if times[0] is not None and times[1] is not None:
        dense_ms, sparse_ms = times[0], times[1]
    if not planner.has_planes(op.x, sparse.source):
        sparse_ms += op.x.elements / _ELEMENTS_A_MILLISECOND
    return Comparison(dense_ms, sparse_ms, None not in times)
