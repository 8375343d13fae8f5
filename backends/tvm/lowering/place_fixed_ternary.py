"""Planning of fixed-point layers whose weights are ternary: two bits each where that pays."""

from dataclasses import fields, replace
from typing import cast

import numpy as np
import torch

from shohin.backends.tvm.kernels.dots import DotUnit, unit_of
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.fixed_conv2d import FixedConv2d, conv_chain
from shohin.backends.tvm.kernels.fixed_linear import FixedLinear as LinearKernel
from shohin.backends.tvm.kernels.fixed_ternary import CODE_BITS, TernaryWeights, most_chained
from shohin.backends.tvm.kernels.fixed_ternary_conv2d import (
    LONG_CHAIN,
    FixedTernaryConv2d,
    fits,
)
from shohin.backends.tvm.kernels.fixed_ternary_linear import (
    FixedTernaryLinear,
    chain_of,
    dot_tile_options,
)
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    FixedConvolution,
    FixedLinear,
)
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.values import numpy_of

_SLOWER = 1.05
"""How many times as long as with bytes a layer may take with codes and still get them.

They take a quarter of the memory, and other layers find more of their weights in the caches."""

_CACHED = 1 << 17
"""Weights from which on a convolution has codes where nothing is measured: fewer stay in a cache
as bytes."""

_FEW_ROWS = 4
"""Rows up to which a fully connected layer has codes where nothing is measured: with more it is
bound by arithmetic."""

_PAIR = 2
"""Products of a group of the units that form few at a time."""

_STREAMED = 1 << 20
"""Weights from which on a layer has codes where nothing is measured and products are formed two at
a time: reading them then costs more than the instructions, half as many again, of the codes."""


def place_ternary_convolution(
    planner: Planner, op: FixedConvolution, plain: FixedConv2d, weight: Array
) -> bool:
    """Place a convolution by two bits of each weight if it is ternary and that pays.

    Args:
        planner: the planner.
        op: a convolution that is not depthwise.
        plain: the kernel that it would get otherwise.
        weight: integers ``[O, C/groups, KH, KW]``.

    Returns:
        Whether it was placed.
    """
    ternary = TernaryWeights.of(weight)
    if ternary is None:
        return False
    narrow = replace(plain, unit=_unit(planner, op, ternary, plain.unit), weight_type="int8")
    if not fits(narrow):
        planner.note(op.label, "ternary, but there is no such kernel: integers as they are")
        return False
    kernel = _ternary_convolution(planner, narrow, ternary)
    by_default = narrow.unit != plain.unit or weight.size >= _least(narrow.unit, _CACHED)
    if not _pays(planner, op.label, (plain, kernel), by_default):
        return False
    kernel = planner.choose(kernel, timed=True)
    codes = planner.constant(lambda: kernel.pack(ternary.codes))
    biases = numpy_of(op.weights.biases)
    arguments = [
        planner.blocked(op.x),
        *_ternary_places(planner, ternary, codes, kernel.filters),
        planner.constant(lambda: kernel.biases(weight, biases)),
        *planner.operands(op, blocked=True, width=kernel.filters),
        planner.define_blocked(op.output),
    ]
    macs = op.output.elements * int(op.weights.codes[0].numel())
    planner.call(kernel, arguments, op.label, macs)
    return True


def _ternary_convolution(
    planner: Planner, plain: FixedConv2d, ternary: TernaryWeights
) -> FixedTernaryConv2d:
    unit, small = plain.unit, ternary.unscaled()
    longest = most_chained(unit, ternary.largest)
    chain = longest if longest >= LONG_CHAIN else conv_chain(unit, small, plain.signed)
    same = {one.name: getattr(plain, one.name) for one in fields(plain)}
    changed = {"chain": chain, "last_channels": 0}
    kernel = FixedTernaryConv2d(**{**same, **changed}, scaled=ternary.scaled)
    options = kernel.variants(planner.target.registers())
    return cast(FixedTernaryConv2d, options[0])


def place_ternary_linear(
    planner: Planner, op: FixedLinear, plain: LinearKernel, x: Placement, weight: Array
) -> bool:
    """Place a fully connected layer by two bits of each weight if it is ternary and that pays.

    Args:
        planner: the planner.
        op: the layer.
        plain: the kernel that it would get otherwise.
        x: the input ``[M, K]``.
        weight: integers ``[N, K]``.

    Returns:
        Whether it was placed.
    """
    ternary = TernaryWeights.of(weight)
    if ternary is None:
        return False
    unit = _unit(planner, op, ternary, plain.unit)
    if plain.wide or not unit.looks_up:
        planner.note(op.label, "ternary, but there is no such kernel: integers as they are")
        return False
    longest = most_chained(unit, ternary.largest)
    kernel = FixedTernaryLinear(
        plain.rows,
        plain.depth,
        plain.columns,
        unit,
        plain.signed,
        plain.result,
        dot_tile_options(unit, plain.rows)[0],
        chain=chain_of(longest),
        scaled=ternary.scaled,
        steps=plain.steps,
    )
    few = plain.rows <= _FEW_ROWS and weight.size >= _least(unit, 0)
    by_default = few or unit != plain.unit
    if not _pays(planner, op.label, (plain, kernel), by_default):
        return False
    kernel = planner.choose(kernel, timed=True)
    codes = planner.constant(lambda: kernel.pack(ternary.codes))
    biases = numpy_of(op.weights.biases)
    arguments = [
        x,
        *_ternary_places(planner, ternary, codes, kernel.padded_columns),
        planner.constant(lambda: kernel.biases(weight, biases)),
        *planner.operands(op, blocked=False, width=kernel.padded_columns),
        planner.define_plain(op.output),
    ]
    planner.call(kernel, arguments, op.label, op.output.elements * plain.depth)
    return True


def _unit(
    planner: Planner,
    op: FixedConvolution | FixedLinear,
    ternary: TernaryWeights,
    plain: DotUnit,
) -> DotUnit:
    """Instructions for the codes: those for bytes, even if the integers of the weight are wider.

    Products are formed with small integers where those of all rows are multiples of two.
    """
    if op.x.dtype == torch.int8 and ternary.largest <= np.iinfo(np.int8).max:
        return unit_of(planner.target, words=False)
    return plain


def _least(unit: DotUnit, usual: int) -> int:
    """Weights from which on a layer has codes where nothing is measured."""
    return usual if unit.group > _PAIR else max(usual, _STREAMED)


def _pays(planner: Planner, label: str, kernels: tuple[Kernel, Kernel], default: bool) -> bool:
    """Whether codes are to be used instead of bytes; a note says what was measured.

    Args:
        planner: knows what was measured.
        label: of the layer.
        kernels: of bytes and of codes.
        default: the answer where nothing is measured.
    """
    chosen = [planner.choose(kernel, timed=True) for kernel in kernels]
    times = [planner.tuner.milliseconds(kernel) for kernel in chosen]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        width = "words" if _is_wide(kernels[0]) else "bytes"
        text = "weights of two bits" if default else f"ternary, as {width}"
        planner.note(label, f"estimated: {text}")
        return default
    plain, codes = known
    width = "words" if _is_wide(kernels[0]) else "bytes"
    planner.note(label, f"measured: {width} {plain:.3f} ms, two bits {codes:.3f} ms")
    return codes <= plain * _SLOWER


def _is_wide(kernel: Kernel) -> bool:
    """Whether a kernel's weights take more than a byte each."""
    return getattr(kernel, "weight_type", "int8") == "int16"


def _ternary_places(
    planner: Planner, ternary: TernaryWeights, codes: Placement, width: int
) -> list[Placement]:
    """Codes, what they stand for, and factors if any."""
    planner.constants.mark_words(codes, CODE_BITS)
    places = [codes, planner.constant(lambda: ternary.pairs(width))]
    if ternary.scaled:
        places.append(planner.constant(lambda: ternary.padded_factors(width)))
    return places
