"""From a program to a binary whose kernels run on a GPU."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from shohin.backends.base import Progress, WeightForm
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.compile import (
    check_interface,
    code_weights,
    describe,
    finish_binary,
    name_kernels,
    symbol_prefix,
)
from shohin.backends.tvm.csource import CONSTANTS_FILE
from shohin.backends.tvm.cuda.device_code import DeviceFunction
from shohin.backends.tvm.cuda.device_code import write_source as write_device_source
from shohin.backends.tvm.cuda.launches import IMAGE_FILE, launches_of
from shohin.backends.tvm.cuda.lowering.lower import lower
from shohin.backends.tvm.cuda.nvrtc import DeviceBinary, compile_source
from shohin.backends.tvm.cuda.target import CudaTarget
from shohin.backends.tvm.link import Parts
from shohin.backends.tvm.lowering.calls import Plan
from shohin.errors import SpecError
from shohin.ir.program import Program

SOURCE_FILE = "kernels.cu"
_STAGES = ("planning", "generating code", "compiling kernels", "linking")


@dataclass(frozen=True)
class CompiledKernels:
    """What a program does on a GPU.

    Attributes:
        plan: launches and memory.
        source: CUDA source of all kernels.
        launched: the function of each launch.
        code: what the compiler made of the source.
    """

    plan: Plan
    source: str
    launched: tuple[DeviceFunction, ...]
    code: DeviceBinary


def compile_kernels(
    program: Program,
    target: CudaTarget,
    batch: int,
    constants: Path,
    begin: Callable[[str], None] = lambda stage: None,
) -> CompiledKernels:
    """Plan a program and compile its kernels.

    Args:
        program: what to compile.
        target: where it will run.
        batch: size of the symbolic batch.
        constants: file to write packed weights to.
        begin: called with each of `_STAGES` but the last, when it begins.

    Raises:
        UnsupportedError: listing every node that cannot be compiled.
        ArtifactError: when NVIDIA's compiler is not installed.
    """
    begin(_STAGES[0])
    plan = lower(program, target, batch, constants)
    check_interface(plan)
    begin(_STAGES[1])
    kernels, symbols = name_kernels(plan, symbol_prefix(program.name))
    source, functions = write_device_source(kernels, target.arch)
    begin(_STAGES[2])
    code = compile_source(source, target.arch)
    return CompiledKernels(plan, source, tuple(functions[one] for one in symbols), code)


def compile_program(
    program: Program,
    target: CudaTarget,
    batch: int,
    progress: Progress | None = None,
    *,
    weights: WeightForm = "plain",
) -> Binary:
    """Compile a program to a binary, held in a temporary folder until it is saved.

    Args:
        program: what to compile.
        target: where it will run.
        batch: size of the symbolic batch.
        progress: called with (stages done, stages, what comes next).
        weights: how the binary holds them.

    Raises:
        SpecError: when the batch is not a positive number.
        UnsupportedError: listing every node that cannot be compiled.
        ArtifactError: when NVIDIA's compiler is not installed.
    """
    if batch < 1:
        raise SpecError("batch", f"expected 1 or more, got {batch}")
    report = progress or (lambda done, total, label: None)

    def begin(stage: str) -> None:
        report(_STAGES.index(stage), len(_STAGES), stage)

    folder = tempfile.TemporaryDirectory(prefix="shohin-")
    parts = Parts(Path(folder.name), symbol_prefix(program.name), target.machine, gpu=True)
    constants = parts.folder / CONSTANTS_FILE
    made = compile_kernels(program, target, batch, constants, begin)
    plan = made.plan
    (parts.folder / SOURCE_FILE).write_text(made.source)
    (parts.folder / IMAGE_FILE).write_bytes(made.code.image)
    if weights == "compressed":
        parts = replace(parts, coded=True)
        constants = code_weights(plan, parts, weights, lambda text: report(2, len(_STAGES), text))
    begin(_STAGES[3])
    described = describe(program, target, batch, plan)
    info = replace(
        described,
        weights=weights,
        weight_bytes=constants.stat().st_size,
        tools={**described.tools, "nvrtc": _compiler_version()},
    )
    work = launches_of(plan, made.launched, parts.name, target, made.code)
    done = finish_binary(folder, plan, parts, info, work)
    report(len(_STAGES), len(_STAGES), "done")
    return done


def _compiler_version() -> str:
    try:
        return version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return "the system's"
