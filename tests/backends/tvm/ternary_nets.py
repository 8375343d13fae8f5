"""Networks with ternary weights, compiled and compared."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from emulated import run_emulated
from small_nets import captured, compare, plan_of_program
from torch import Tensor, nn

from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.target import CpuTarget
from shohin.ir.encodings import Dense
from shohin.ir.program import Program, Stage, tensor_of
from shohin.ir.ternary import Ternary

Scales = Literal["layer", "rows", "by row"]
"""One pair of values of a layer; the same times a number for each row; a pair for each row."""

SCALES: tuple[Scales, ...] = ("layer", "rows", "by row")


def ternary_weight(
    shape: tuple[int, ...], scales: Scales = "layer", density: float = 0.5, seed: int = 0
) -> Ternary:
    """Random codes, none but zero in the second row, and values that are not the same.

    Multipliers of rows are of both signs, and one is zero, as a folded normalisation may have them.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    kept = torch.rand(shape, generator=generator) < density
    codes = torch.where(kept, signs, 0).to(torch.int8)
    codes[1:2] = 0
    if scales == "by row":
        return Ternary(codes, Dense(torch.rand(shape[0], 2, generator=generator) + 0.2))
    rows = torch.randn(shape[0], generator=generator)
    rows[2:3] = 0.0
    pair = Dense(torch.tensor([0.75, 0.3]))
    return Ternary(codes, pair, rows if scales == "rows" else None)


def ternary(
    module: nn.Module,
    *shapes: tuple[int, ...],
    batch: int = 1,
    scales: Scales = "layer",
    density: float = 0.5,
) -> Program:
    """The program of a network whose weights of several axes are made ternary.

    Args:
        module: the network.
        shapes: sizes of its inputs behind the batch.
        batch: the batch.
        scales: how many values there are.
        density: share of the codes that are not zero.
    """
    program = captured(module, *shapes, batch=batch)
    encodings = {}
    with torch.no_grad():
        for seed, name in enumerate(n for n, p in module.named_parameters() if p.dim() > 1):
            weight = tensor_of(program.module, name)
            encodings[name] = ternary_weight(tuple(weight.shape), scales, density, seed)
            weight.copy_(encodings[name].materialise())
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def families(program: Program, batch: int = 1, arch: str = "x86-64-v4") -> list[str]:
    """Families of the kernels that a program is planned as, in order."""
    plan = plan_of_program(program, batch, CpuTarget(arch))
    return [call.kernel.family for call in plan.calls]


def notes(program: Program, batch: int = 1, arch: str = "x86-64-v4") -> list[str]:
    """What the plan of a program says of its layers."""
    plan = plan_of_program(program, batch, CpuTarget(arch))
    return [call.note for call in plan.calls if call.note]


def check_ternary(
    program: Program,
    *shapes: tuple[int, ...],
    batch: int = 1,
    threads: int = 2,
    arch: str = "native",
) -> None:
    """Compile a program and compare its output with PyTorch's, which has the dense weights."""
    binary = compile_program(program, CpuTarget(arch, threads=threads), batch)
    inputs = _inputs(batch, shapes)
    for _ in range(2):
        compare(binary(*inputs), _expected(program, inputs), 1e-5)


def check_emulated(
    program: Program, target: str, folder: Path, *shapes: tuple[int, ...], batch: int = 1
) -> None:
    """The same on a core that is emulated."""
    inputs = _inputs(batch, shapes)
    compare(run_emulated(program, target, inputs, folder), _expected(program, inputs), 1e-5)


def _inputs(batch: int, shapes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *shape, generator=generator) for shape in shapes]


def _expected(program: Program, inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        expected: Tensor = program.module(*inputs)
    return expected
