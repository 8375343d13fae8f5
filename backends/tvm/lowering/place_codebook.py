"""Planning of fully connected layers whose weights are shared, by their indices."""

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
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, kernel_cost
from shohin.backends.tvm.lowering.values import bias_numbers

_MOST_ROWS = 16
"""Rows up to which streaming dense weights takes longer than adding them up."""


def codebook_linear(
    planner: Planner, op: Linear, dense: MatMul, given: tuple[Array, Rows], x: Placement
) -> Candidate | str:
    """A fully connected layer by indices, or what there is no kernel for.

    Args:
        planner: the planner.
        op: a layer whose weight has few different values.
        dense: the kernel it would get otherwise.
        given: the values; and what gives rows of the weight, the columns in the order of the input.
        x: the input ``[M, K]``.
    """
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
