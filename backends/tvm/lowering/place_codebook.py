"""Planning of fully connected layers whose weights are shared: indices where they are faster."""

import numpy as np

from shohin.backends.tvm.kernels.codebook_linear import (
    CodebookLinear,
    Rows,
    TableForm,
    choose_codebook_tile,
)
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Linear
from shohin.backends.tvm.lowering.place_sparse_linear import sparse_candidate
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, Comparison, kernel_cost
from shohin.backends.tvm.lowering.values import bias_numbers, numpy_of

_MOST_ROWS = 16
"""Rows up to which streaming dense weights takes longer than adding them up."""


def place_compressed_linear(
    planner: Planner, op: Linear, dense: MatMul, weight: Rows, x: Placement
) -> bool:
    """Place a fully connected layer by its sparse weights or its indices if that is faster.

    Args:
        planner: the planner.
        op: the layer.
        dense: the kernel it would get otherwise.
        weight: gives rows of the weight, the columns in the order of the input.
        x: the input ``[M, K]``.

    Returns:
        Whether it was placed.
    """
    if not op.sparse and op.values is None:
        return False
    candidates: dict[str, Candidate] = {}
    remarks = []
    if op.sparse:
        candidates["sparse"] = sparse_candidate(planner, op, weight(0, dense.columns), x)
    if op.values is not None:
        found = _codebook_candidate(planner, op, dense, (numpy_of(op.values), weight), x)
        if isinstance(found, Candidate):
            candidates["codebook"] = found
        else:
            remarks.append(f"no codebook kernel {found}")
    costs = {name: candidate.cost for name, candidate in candidates.items()}
    comparison = Comparison(kernel_cost(planner, dense), **costs)
    times = comparison.text() if candidates else "dense"
    planner.note(op.label, "; ".join([times, *remarks]))
    if not comparison.pays:
        return False
    candidates[comparison.fastest].place()
    return True


def _codebook_candidate(
    planner: Planner, op: Linear, dense: MatMul, given: tuple[Array, Rows], x: Placement
) -> Candidate | str:
    """The layer by indices, or what there is no kernel for."""
    values, weight = given
    if dense.depth != op.weight.shape[1]:  # Inputs that only pad an image have zeros.
        values = np.append(values, np.float32(0.0))
    values = np.unique(values)
    lanes = planner.target.table_lanes()
    if not lanes:
        return f"on {planner.target.resolved()}"
    if dense.rows > _MOST_ROWS:
        return f"for {dense.rows} rows"
    form = TableForm.of(values, lanes)
    if not form.exists:
        return f"for {values.size} values"
    tile = choose_codebook_tile(form, dense.rows, dense.columns, planner.target.registers())
    kernel = planner.choose(
        CodebookLinear(dense.rows, dense.depth, dense.columns, form, tile, dense.steps), timed=True
    )
    return Candidate(
        kernel_cost(planner, kernel), lambda: _call(planner, op, kernel, (values, weight), x)
    )


def _call(
    planner: Planner,
    op: Linear,
    kernel: CodebookLinear,
    given: tuple[Array, Rows],
    x: Placement,
) -> None:
    values, weight = given
    words = planner.constant(lambda: kernel.pack(values, weight))
    planner.constants.mark_words(words, kernel.form.bits)
    arguments = [
        x,
        words,
        planner.constant(lambda: kernel.form.table(values)),
        planner.constant(lambda: bias_numbers(op, kernel.padded_columns)),
        *planner.operands(op, blocked=False, width=kernel.padded_columns),
        planner.define_plain(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * int(op.weight.shape[1]))
