"""Planning of layers whose weights are compressed: by the kernels that this makes the fastest."""

from collections.abc import Callable

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.indexed_linear import Rows
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Convolution, Linear
from shohin.backends.tvm.lowering.place_codebook import codebook_linear
from shohin.backends.tvm.lowering.place_sparse import sparse_convolution
from shohin.backends.tvm.lowering.place_sparse_linear import sparse_candidate
from shohin.backends.tvm.lowering.place_ternary import packed_convolution, packed_linear
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, Comparison, Cost, kernel_cost
from shohin.backends.tvm.lowering.values import numpy_of


def place_compressed_convolution(planner: Planner, op: Convolution, dense: Conv2d) -> bool:
    """Place a convolution by its sparse weights or its codes if that pays.

    Args:
        planner: the planner.
        op: a convolution that is not depthwise.
        dense: the kernel it would get otherwise.

    Returns:
        Whether it was placed.
    """
    moved = planner.moved_for_readers(op.output, planes=False)
    found: dict[str, Candidate | str] = {}
    if op.may_be_sparse:
        found["sparse"] = sparse_convolution(planner, op)
    if op.ternary is not None:
        found["packed"] = packed_convolution(planner, op, dense, moved)
    return _place_best(planner, op.label, kernel_cost(planner, dense, moved), found)


def place_compressed_linear(
    planner: Planner, op: Linear, dense: MatMul, ordered: Callable[[Array], Rows], x: Placement
) -> bool:
    """Place a fully connected layer by its sparse weights, indices or codes if that pays.

    Args:
        planner: the planner.
        op: the layer.
        dense: the kernel it would get otherwise.
        ordered: makes of an array of the weight's shape what gives some of its rows, the columns
            in the order of the input.
        x: the input ``[M, K]``.

    Returns:
        Whether it was placed.
    """
    found: dict[str, Candidate | str] = {}
    weight = ordered(numpy_of(op.weight))
    if op.sparse:
        found["sparse"] = sparse_candidate(planner, op, weight(0, dense.columns), x)
    if op.values is not None:
        found["codebook"] = codebook_linear(planner, op, dense, (numpy_of(op.values), weight), x)
    if op.ternary is not None:
        found["packed"] = packed_linear(planner, op, dense, ordered, x)
    return _place_best(planner, op.label, kernel_cost(planner, dense), found)


def _place_best(
    planner: Planner, label: str, dense: Cost, found: dict[str, Candidate | str]
) -> bool:
    """Note what a layer takes each way, and place it unless the dense kernel is the best.

    Args:
        planner: the planner.
        label: the layer's.
        dense: what the dense kernel takes.
        found: the other ways by name; or what there is no kernel for.
    """
    candidates = {name: one for name, one in found.items() if isinstance(one, Candidate)}
    remarks = [f"no {name} kernel {one}" for name, one in found.items() if isinstance(one, str)]
    comparison = Comparison(dense, **{name: one.cost for name, one in candidates.items()})
    times = comparison.text() if candidates else "dense"
    planner.note(label, "; ".join([times, *remarks]))
    if comparison.pays:
        candidates[comparison.best].place()
    return comparison.pays
