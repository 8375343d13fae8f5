"""Planning of layers whose weights are ternary, by kernels that read two bits a weight."""

from collections.abc import Callable
from dataclasses import fields

import numpy as np

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.indexed_linear import Rows
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.kernels.packed_conv2d import PackedConv2d
from shohin.backends.tvm.kernels.packed_matmul import PackedMatMul
from shohin.backends.tvm.kernels.subset_sums import SubsetForm, SubsetSums
from shohin.backends.tvm.kernels.ternary_codes import BITS
from shohin.backends.tvm.kernels.ternary_linear import TernaryLinear, ternary_tile_options
from shohin.backends.tvm.lowering.groups import merge_groups
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Convolution, Linear, TernaryWeight
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.sparse_costs import Candidate, Cost, kernel_cost
from shohin.backends.tvm.lowering.values import bias_numbers, macs_of, numpy_of

_MOST_SUBSET_ROWS = 8
"""Rows up to which sums of subsets are tried: each row has its own."""

_ITEMS_A_THREAD = 4
"""Work items of a layer, so that threads that finish early find more to do."""


def packed_convolution(
    planner: Planner, op: Convolution, dense: Conv2d, moved: int
) -> Candidate | str:
    """A convolution by its codes, or what there is no kernel for.

    Args:
        planner: the planner.
        op: a convolution whose weight is ternary.
        dense: the kernel it would get otherwise.
        moved: elements whose layout changes for readers of its result.
    """
    weight = _ternary(op)
    common = {field.name: getattr(dense, field.name) for field in fields(Conv2d)}
    some = PackedConv2d(**common, items=_items(planner))
    if not some.variants(planner.target.registers()):
        return "for {} x {} filters".format(*dense.geometry.kernel)
    kernel = planner.choose(some, timed=True)

    def place() -> None:
        codes, _ = merge_groups(numpy_of(weight.codes), op.groups, op.x.shape[1])
        arguments = [
            planner.image(op.x, plain=kernel.plain_input),
            _words(planner, lambda: kernel.pack(codes), BITS),
            _values(planner, weight, kernel.filters),
            planner.constant(lambda: bias_numbers(op, kernel.filters)),
            *planner.operands(op, blocked=True, width=kernel.filters),
            planner.define_blocked(op.output),
        ]
        planner.call(kernel, arguments, op.label, macs_of(op))

    return Candidate(kernel_cost(planner, kernel, moved), place)


def packed_linear(
    planner: Planner,
    op: Linear,
    dense: MatMul,
    ordered: Callable[[Array], Rows],
    x: Placement,
) -> Candidate:
    """A fully connected layer by its codes, the fastest way.

    Args:
        planner: the planner.
        op: a layer whose weight is ternary.
        dense: the kernel it would get otherwise.
        ordered: makes of the codes what gives those of some outputs, the columns in the order of
            the input.
        x: the input ``[M, K]``.
    """
    codes = ordered(numpy_of(_ternary(op).codes))
    options = [_by_expansion(planner, op, dense, codes, x)]
    if planner.target.table_lanes() and dense.rows <= _MOST_SUBSET_ROWS:
        options.append(_by_subsets(planner, op, dense, codes, x))
    return min(options, key=lambda candidate: candidate.cost.milliseconds)


def _by_expansion(
    planner: Planner, op: Linear, dense: MatMul, codes: Rows, x: Placement
) -> Candidate:
    common = {field.name: getattr(dense, field.name) for field in fields(MatMul)}
    kernel = planner.choose(PackedMatMul(**common, items=_items(planner)), timed=True)

    def place() -> None:
        biases = [_biases(planner, op, kernel)] if kernel.bias else []
        words = _words(planner, lambda: kernel.pack(codes), BITS)
        _call(planner, op, kernel, [x, words], biases)

    return Candidate(kernel_cost(planner, kernel), place)


def _by_subsets(
    planner: Planner, op: Linear, dense: MatMul, codes: Rows, x: Placement
) -> Candidate:
    rows, depth, columns = dense.rows, dense.depth, dense.columns
    form = SubsetForm.of(planner.target.table_lanes())
    sums = planner.choose(SubsetSums(rows, depth, form), timed=True)
    tile = ternary_tile_options(rows, columns, planner.target.registers())[0]
    some = TernaryLinear(rows, depth, columns, form, tile, dense.steps)
    kernel = planner.choose(some, timed=True)
    first, second = kernel_cost(planner, sums), kernel_cost(planner, kernel)

    def place() -> None:
        tables = planner.new_buffer(sums.parameters()[-1].bytes)
        planner.call(sums, [x, tables], f"{op.label}: subset sums")
        words = _words(planner, lambda: kernel.pack(codes), form.bits)
        _call(planner, op, kernel, [tables, words], [_biases(planner, op, kernel)])

    both = Cost(first.milliseconds + second.milliseconds, first.measured and second.measured)
    return Candidate(both, place)


def _call(
    planner: Planner,
    op: Linear,
    kernel: PackedMatMul | TernaryLinear,
    given: list[Placement],
    biases: list[Placement],
) -> None:
    arguments = [
        *given,
        _values(planner, _ternary(op), kernel.padded_columns),
        *biases,
        *planner.operands(op, blocked=False, width=kernel.padded_columns),
        planner.define_plain(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * int(op.weight.shape[1]))


def _items(planner: Planner) -> int:
    threads = planner.target.threads
    return _ITEMS_A_THREAD * threads if threads > 1 else 1


def _ternary(op: Convolution | Linear) -> TernaryWeight:
    if op.ternary is None:
        raise ValueError(f"the weight of {op.label} is not ternary")
    return op.ternary


def _biases(planner: Planner, op: Linear, kernel: PackedMatMul | TernaryLinear) -> Placement:
    return planner.constant(lambda: bias_numbers(op, kernel.padded_columns))


def _words(planner: Planner, pack: Callable[[], Array], bits: int) -> Placement:
    words = planner.constant(pack)
    planner.constants.mark_words(words, bits)
    return words


def _values(planner: Planner, weight: TernaryWeight, width: int) -> Placement:
    """Both values of every output ``[2, width]``, 0 where there is none."""

    def pack() -> Array:
        values = np.zeros((2, width), np.float32)
        values[:, : weight.values.shape[0]] = numpy_of(weight.values).T
        return values

    return planner.constant(pack)
