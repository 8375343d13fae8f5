"""Networks whose layers are pruned, compiled and compared."""

import torch
from small_nets import calls_text, captured, compare, plan_of_program
from torch import nn

from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.target import CpuTarget
from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.prune import Prune


def pruned(module: nn.Module, *shapes: tuple[int, ...], batch: int, density: float) -> Program:
    """The program of a network of whose weights so many are left."""
    program = captured(module, *shapes, batch=batch)
    return Prune(density=density).run(program, Context()).program


def check_pruned(
    module: nn.Module, *shapes: tuple[int, ...], batch: int, density: float = 0.3, threads: int = 2
) -> Program:
    """Compile a pruned network and compare its outputs with PyTorch's.

    Args:
        module: the network.
        shapes: sizes of its inputs behind the batch.
        batch: the batch.
        density: share of the weights that is left.
        threads: threads to run on.

    Returns:
        The pruned program.
    """
    program = pruned(module, *shapes, batch=batch, density=density)
    binary = compile_program(program, CpuTarget(threads=threads), batch)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        expected = program.module(*inputs)
    for _ in range(2):
        compare(binary(*inputs), expected, 1e-5)
    return program


def kernel_names(program: Program, batch: int) -> list[str]:
    """Families of the kernels that a program is planned as, in order."""
    plan = plan_of_program(program, batch, CpuTarget("x86-64-v4"))
    return [line.split()[0] for line in calls_text(plan).splitlines()]
