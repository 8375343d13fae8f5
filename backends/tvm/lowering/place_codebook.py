"""Planning of fully connected layers whose weights are shared, by their indices."""

from typing import cast

import numpy as np

from shohin.backends.tvm.kernels.byte_codebook_linear import (
    ByteCodebookLinear,
    ByteForm,
    byte_tile_options,
)
from shohin.backends.tvm.kernels.byte_tables import TableName
from shohin.backends.tvm.kernels.codebook_linear import (
    CodebookLinear,
    TableForm,
    choose_codebook_tile,
)
from shohin.backends.tvm.kernels.indexed_linear import Rows
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Linear
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, kernel_cost
from shohin.backends.tvm.lowering.values import bias_numbers
from shohin.backends.tvm.processor import Processor

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
    if dense.rows > _MOST_ROWS:
        return f"for {dense.rows} rows"
    some = _kernel(planner.target, dense, values)
    if some is None:
        return f"for {values.size} values on {planner.target.resolved()}"
    kernel = planner.choose(some, timed=True)
    return Candidate(
        kernel_cost(planner, kernel), lambda: _call(planner, op, kernel, (values, weight), x)
    )


def _kernel(
    target: Processor, dense: MatMul, values: Array
) -> CodebookLinear | ByteCodebookLinear | None:
    """A kernel that looks so many values up on a processor; None if it has none."""
    shape, registers = (dense.rows, dense.depth, dense.columns), target.registers()
    if lanes := target.table_lanes():
        form = TableForm.of(values, lanes)
        tile = choose_codebook_tile(form, dense.rows, dense.columns, registers)
        return CodebookLinear(*shape, form, tile, dense.steps) if form.exists else None
    if not (name := target.byte_tables()):
        return None
    byte_form = ByteForm.of(values, cast(TableName, name))
    tile = byte_tile_options(dense.rows, dense.columns, registers)[0]
    return ByteCodebookLinear(*shape, byte_form, tile, dense.steps) if byte_form.exists else None


def _call(
    planner: Planner,
    op: Linear,
    kernel: CodebookLinear | ByteCodebookLinear,
    given: tuple[Array, Rows],
    x: Placement,
) -> None:
    values, weight = given
    words = planner.constant(lambda: kernel.pack(values, weight))
    if isinstance(kernel, CodebookLinear):
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
