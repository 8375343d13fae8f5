"""From a program to a linked binary."""

import hashlib
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from shohin.backends.base import ArtifactInfo, StepInfo, WeightForm
from shohin.backends.tvm.binary import Binary, Build
from shohin.backends.tvm.csource import (
    CODED_FILE,
    CONSTANTS_FILE,
    Weights,
    Work,
    steps_of,
    supports_dtype,
    write_source,
)
from shohin.backends.tvm.kernels.emit import Template
from shohin.backends.tvm.link import Parts, link
from shohin.backends.tvm.lowering.calls import KernelCall, Plan
from shohin.backends.tvm.lowering.lower import lower
from shohin.backends.tvm.lowering.operations import Value
from shohin.backends.tvm.manifest import manifest_of
from shohin.backends.tvm.objects import emit_object
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.trailer import append_trailer
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.backends.tvm.weights.file import write_coded
from shohin.errors import SpecError, UnsupportedError
from shohin.ir.coding import CODERS
from shohin.ir.program import BATCH, InputSpec, Program, output_names
from shohin.ir.serialise import content_hash

Progress = Callable[[int, int, str], None]
_STAGES = ("planning", "generating code", "linking")


def compile_program(
    program: Program,
    target: Processor,
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
    """
    if batch < 1:
        raise SpecError("batch", f"expected 1 or more, got {batch}")
    report = progress or (lambda done, total, label: None)
    folder = tempfile.TemporaryDirectory(prefix="shohin-")
    parts = Parts(Path(folder.name), symbol_prefix(program.name), target.machine)
    report(0, len(_STAGES), _STAGES[0])
    constants = parts.folder / CONSTANTS_FILE
    plan = lower(program, Tuner(target), batch, constants, report)
    check_interface(plan)
    report(1, len(_STAGES), _STAGES[1])
    functions, symbols = name_kernels(plan, parts.name)
    emit_object(functions, target, parts.kernels)
    if weights == "compressed" or plan.narrow:
        parts = replace(parts, coded=True)
        constants = code_weights(plan, parts, weights, lambda text: report(1, len(_STAGES), text))
    report(2, len(_STAGES), _STAGES[2])
    info = replace(
        describe(program, target, batch, plan),
        weights=weights,
        weight_bytes=constants.stat().st_size,
    )
    done = finish_binary(folder, plan, parts, info, steps_of(plan, symbols))
    report(len(_STAGES), len(_STAGES), "done")
    return done


def finish_binary(
    folder: "tempfile.TemporaryDirectory[str]",
    plan: Plan,
    parts: Parts,
    info: ArtifactInfo,
    work: Work,
) -> Binary:
    """Link what was compiled.

    Args:
        folder: holds the files.
        plan: knows the interface and memory.
        parts: the files, the weights among them.
        info: what the binary says of itself.
        work: what the model does.
    """
    parts.source.write_text(write_source(plan, parts.name, info, _weights(parts, info), work))
    library = parts.folder / "model.so"
    link(parts, "so", library, "glibc")
    append_trailer(library, manifest_of(info, parts.name))
    build = Build(folder, parts, plan.arena_bytes, plan.constants.size)
    return Binary(info, library, parts.name, build)


def code_weights(
    plan: Plan, parts: Parts, weights: WeightForm, report: Callable[[str], None]
) -> Path:
    """Replace the file of weights by one that holds them coded, and say where it is.

    Args:
        plan: knows what the constants are.
        parts: where the files are.
        weights: ``compressed``, or ``plain`` where only integers of few bits are packed.
        report: called with what is done.
    """
    coded = parts.folder / CODED_FILE
    coders = CODERS if weights == "compressed" else CODERS[:1]
    write_coded(plan.constants, coded, report, coders)
    (parts.folder / CONSTANTS_FILE).unlink()
    return coded


def symbol_prefix(name: str) -> str:
    """The C identifier closest to a model's name."""
    identifier = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_").lower() or "model"
    return f"model_{identifier}" if identifier[0].isdigit() else identifier


def check_interface(plan: Plan) -> None:
    """Refuse inputs and outputs of types that the C interface has no name for.

    Raises:
        UnsupportedError: naming them.
    """
    faults = [v for v in (*plan.inputs, *plan.outputs) if not supports_dtype(v)]
    if faults:
        texts = ", ".join(f"{v.name}: {v.dtype}" for v in faults)
        raise UnsupportedError(
            "backend tvm",
            f"inputs and outputs of these types cannot cross the C interface: {texts}",
            "convert them inside the model",
        )


def name_kernels(plan: Plan, prefix: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Build each different kernel once.

    Args:
        plan: the calls.
        prefix: of the symbols.

    Returns:
        TIR functions by symbol, and the symbol of each call.
    """
    symbols: dict[Any, str] = {}
    functions: dict[str, Any] = {}
    names = []
    for call in plan.calls:
        key = call.kernel if isinstance(call.kernel, Template) else id(call.kernel)
        if key not in symbols:
            symbols[key] = f"{prefix}_{_family(call)}_{len(symbols)}"
            built = call.kernel.build() if isinstance(call.kernel, Template) else call.kernel
            functions[symbols[key]] = built
        names.append(symbols[key])
    return functions, tuple(names)


def _family(call: KernelCall) -> str:
    return call.kernel.family if isinstance(call.kernel, Template) else "region"


def _spec(value: Value, name: str) -> InputSpec:
    return InputSpec(name, value.shape, value.dtype)


def _step(call: KernelCall) -> StepInfo:
    kernel = _family(call)
    if isinstance(call.kernel, Template) and call.kernel.tile_text():
        kernel = f"{kernel} {call.kernel.tile_text()}"
    return StepInfo(call.label, kernel, call.macs, _bytes_touched(call), call.note)


def _bytes_touched(call: KernelCall) -> int:
    """Sizes of the arrays that a call reads and writes."""
    if isinstance(call.kernel, Template):
        return sum(parameter.bytes for parameter in call.kernel.parameters())
    return sum(argument.buffer.bytes for argument in call.arguments)


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    """The names, numbered where one comes again or is taken."""
    taken = set(names)
    unique: list[str] = []
    for name in names:
        number = 0
        candidate = name
        while candidate in unique or (number and candidate in taken):
            number += 1
            candidate = f"{name}_{number}"
        unique.append(candidate)
    return tuple(unique)


class Described(Protocol):
    """A target, as far as a binary says what it was compiled for."""

    def describe(self) -> str:
        """Canonical text."""

    def resolved(self) -> str:
        """Name of the exact processor or level."""

    def needs(self) -> tuple[str, ...]:
        """Instruction sets that the code needs."""


def describe(program: Program, target: Described, batch: int, plan: Plan) -> ArtifactInfo:
    """What a binary says of itself, its weights left out."""
    outputs = _unique(output_names(program, [value.name for value in plan.outputs]))
    has_batch = all(spec.shape[:1] == (BATCH,) for spec in program.inputs) and all(
        value.shape[:1] == (batch,) for value in plan.outputs
    )
    return ArtifactInfo(
        name=program.name,
        target=target.describe(),
        pipeline=", ".join(program.history),
        inputs=tuple(
            _spec(value, spec.name) for value, spec in zip(plan.inputs, program.inputs, strict=True)
        ),
        outputs=tuple(
            _spec(value, name) for value, name in zip(plan.outputs, outputs, strict=True)
        ),
        batch=batch if has_batch else 0,
        content_hash=content_hash(program),
        tools={
            "shohin": version("shohin"),
            "torch": torch.__version__,
            "tvm": version("apache-tvm"),
            "zig": version("ziglang"),
            "processor": target.resolved(),
        },
        needs=target.needs(),
        steps=tuple(_step(call) for call in plan.calls),
    )


def _weights(parts: Parts, info: ArtifactInfo) -> Weights:
    """The file of weights, as the generated source includes it."""
    file = parts.folder / (CODED_FILE if parts.coded else CONSTANTS_FILE)
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return Weights(digest, info.weight_bytes if parts.coded else None)
