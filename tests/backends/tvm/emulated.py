"""Runs binaries for other processors under an emulator: the oldest that their code is for."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from small_nets import captured, compare
from torch import Tensor, nn

from shohin.backends.base import WeightForm
from shohin.backends.registry import parse_target
from shohin.backends.tvm.compile import compile_program
from shohin.ir.program import Program

_EMULATORS = {"aarch64": "qemu-aarch64", "arm": "qemu-arm", "riscv64": "qemu-riscv64"}

EMULATED = pytest.mark.skipif(
    any(shutil.which(name) is None for name in _EMULATORS.values()),
    reason="needs qemu-aarch64, qemu-arm and qemu-riscv64, e.g. of Debian's package qemu-user",
)

# An instruction that a core does not have is then found.
_CORES = {
    "armv8-a": "cortex-a53",
    "armv8-a+dotprod": "cortex-a76",
    "armv7-a": "cortex-a9",
    "rv64gc": "rv64",
}


def emulator(machine: str, processor: str) -> list[str]:
    """The command that runs a program for a processor.

    Args:
        machine: its family, as Linux calls it.
        processor: what its target resolves to.
    """
    name = processor.removesuffix("+nodotprod").removesuffix("+dotprod").removeprefix("armv7-a+")
    return [_EMULATORS[machine], "-cpu", _CORES.get(processor, name)]


def run_emulated(
    program: Program,
    target: str,
    inputs: list[Tensor],
    folder: Path,
    weights: WeightForm = "plain",
) -> Tensor:
    """The one output of a program's executable.

    Args:
        program: with a batch of the inputs' size.
        target: e.g. ``armv7{cpu=cortex-a7}``.
        inputs: what goes in.
        folder: where files are written; the executable is ``net``.
        weights: how it holds them.
    """
    options = parse_target(target).options
    compiled = compile_program(program, options, len(inputs[0]), weights=weights)
    binary = compiled.save(folder / "net")
    files = [folder / f"x{i}.npy" for i in range(len(inputs))]
    for file, tensor in zip(files, inputs, strict=True):
        np.save(file, tensor.numpy())
    command = [*emulator(options.machine, options.resolved()), binary, *files, "--threads", "2"]
    done = subprocess.run(
        [*command, "--output", folder / "y.npy"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.from_numpy(np.load(folder / "y.npy"))


def check_emulated(module: nn.Module, target: str, folder: Path, *shapes: tuple[int, ...]) -> None:
    """Compare a module's numbers with those of its executable.

    Args:
        module: what is compiled.
        target: where for.
        folder: where files are written.
        shapes: of the inputs, without the batch.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    with torch.no_grad():
        expected = module(*inputs)
    found = run_emulated(captured(module, *shapes), target, inputs, folder)
    compare(found, expected, tolerance=1e-5)
