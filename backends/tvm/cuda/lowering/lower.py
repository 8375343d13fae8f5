"""The whole lowering for a GPU: select, fuse, plan, and lay out memory."""

from pathlib import Path

import torch
from torch import fx

from shohin.backends.tvm.cuda.lowering import fixed, images, matrices, regions
from shohin.backends.tvm.cuda.lowering.planner import CudaPlanner, Placer
from shohin.backends.tvm.cuda.target import CudaTarget
from shohin.backends.tvm.lowering import lower as processors
from shohin.backends.tvm.lowering import operations as ops
from shohin.backends.tvm.lowering.calls import Plan
from shohin.backends.tvm.lowering.memory import ConstantFile, plan_arena
from shohin.backends.tvm.lowering.operations import Operation
from shohin.errors import UnsupportedError
from shohin.ir.program import Program
from shohin.ir.shapes import fake_values

PLACERS: dict[type[Operation], Placer] = {
    ops.Convolution: images.place_convolution,
    ops.ConvolutionPair: images.place_pair,
    ops.Pooling: images.place_pooling,
    ops.GlobalAveragePooling: images.place_global_average,
    ops.Concatenation: images.place_concatenation,
    ops.WindowCopy: images.place_window,
    ops.Linear: matrices.place_linear,
    ops.FixedConvolution: fixed.place_convolution,
    ops.FixedLinear: fixed.place_linear,
    ops.FixedAverage: fixed.place_average,
    ops.BatchedMatMul: matrices.place_batched_matmul,
    ops.Elementwise: matrices.place_elementwise,
    ops.SoftmaxRows: matrices.place_softmax,
    ops.LayerNormalisation: matrices.place_layer_norm,
    ops.View: matrices.place_view,
    ops.Region: regions.place_region,
}


_HALF = (torch.float16, torch.bfloat16)


def half_precision(program: Program, batch: int = 1) -> list[fx.Node]:
    """Nodes of half precision, for which there are no kernels."""
    fakes = fake_values(program.module, program.inputs, batch)
    return [
        node
        for node, fake in fakes.items()
        if isinstance(fake, torch.Tensor) and fake.dtype in _HALF
    ]


def lower(program: Program, target: CudaTarget, batch: int, constants: Path) -> Plan:
    """Plan a binary.

    Args:
        program: what to compile.
        target: the GPU.
        batch: size of the symbolic batch.
        constants: file to write packed weights to.

    Raises:
        UnsupportedError: listing every node that nothing can compile.
    """
    if found := half_precision(program, batch):
        names = ", ".join(node.name for node in found[:8])
        problem = f"these nodes have half precision, for which there are no kernels: {names}"
        raise UnsupportedError("backend cuda", problem, "convert them to float32 in the model")
    operations = processors.select(program, batch)
    planner = CudaPlanner(target, ConstantFile(constants), PLACERS)
    calls = planner.plan(operations)
    constants.touch()
    arena = plan_arena(planner.buffers)
    return Plan(calls, operations.inputs, operations.outputs, arena, planner.constants)
