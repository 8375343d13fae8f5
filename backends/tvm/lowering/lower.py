"""The whole lowering: select, fuse, plan, and lay out memory."""

from pathlib import Path

from shohin.backends.tvm.lowering import elementwise, images, layers
from shohin.backends.tvm.lowering import operations as ops
from shohin.backends.tvm.lowering import place_fixed as pf
from shohin.backends.tvm.lowering import place_images as pi
from shohin.backends.tvm.lowering import place_matrices as pm
from shohin.backends.tvm.lowering import place_pairs as pp
from shohin.backends.tvm.lowering import place_regions as pr
from shohin.backends.tvm.lowering.calls import Plan
from shohin.backends.tvm.lowering.fixed import select_fixed
from shohin.backends.tvm.lowering.fuse import fuse
from shohin.backends.tvm.lowering.memory import ConstantFile, plan_arena
from shohin.backends.tvm.lowering.operations import Operation, Operations, Region
from shohin.backends.tvm.lowering.plan import Placer, Planner
from shohin.backends.tvm.lowering.select import Selector
from shohin.backends.tvm.tuning.tuner import Progress, Tuner
from shohin.ir.program import Program

PASSING = images.PASSING | elementwise.PASSING | layers.PASSING

HANDLERS = {**images.HANDLERS, **elementwise.HANDLERS, **layers.HANDLERS}

PLACERS: dict[type[Operation], Placer] = {
    ops.Convolution: pi.place_convolution,
    ops.ConvolutionPair: pp.place_pair,
    ops.Pooling: pi.place_pooling,
    ops.GlobalAveragePooling: pi.place_global_average,
    ops.Concatenation: pi.place_concatenation,
    ops.WindowCopy: pi.place_window,
    ops.Linear: pm.place_linear,
    ops.FixedConvolution: pf.place_convolution,
    ops.FixedLinear: pf.place_linear,
    ops.FixedAverage: pf.place_average,
    ops.BatchedMatMul: pm.place_batched_matmul,
    ops.Elementwise: pm.place_elementwise,
    ops.SoftmaxRows: pm.place_softmax,
    ops.LayerNormalisation: pm.place_layer_norm,
    ops.View: pm.place_view,
    ops.Region: pr.place_region,
}


_MEASURING_ROUNDS = 3
"""Measurements may change a choice of kernels, and with it the layouts that others read."""


def select(program: Program, batch: int) -> Operations:
    """A program's operations at a batch size, fused.

    Raises:
        UnsupportedError: listing every node that nothing can compile.
    """
    selector = Selector(program, batch, HANDLERS, select_fixed, PASSING)
    operations = pp.pair_convolutions(fuse(selector.select()))
    pr.refuse_unsupported([op for op in operations.operations if isinstance(op, Region)])
    return operations


def lower(program: Program, tuner: Tuner, batch: int, constants: Path, progress: Progress) -> Plan:
    """Plan a binary.

    Args:
        program: what to compile.
        tuner: where it will run, and how much to measure beforehand.
        batch: size of the symbolic batch.
        constants: file to write packed weights to.
        progress: called while kernels are measured.

    Raises:
        SpecError: when packages that the target's options need are not installed.
        UnsupportedError: listing every node that nothing can compile.
    """
    operations = select(program, batch)
    for _ in range(_MEASURING_ROUNDS if tuner.measures else 0):
        Planner(tuner, ConstantFile(None), PLACERS).plan(operations)
        if not tuner.measure(progress):
            break
    planner = Planner(tuner, ConstantFile(constants), PLACERS)
    calls = planner.plan(operations)
    constants.touch()
    arena = plan_arena(planner.buffers)
    inputs, outputs = operations.inputs, operations.outputs
    return Plan(calls, inputs, outputs, arena, planner.constants, planner.narrow)
