"""The reference backend: runs a program of any stage in PyTorch, the oracle for all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from shohin.backends.base import (
    Artifact,
    ArtifactInfo,
    Backend,
    Diagnostic,
    Progress,
    WeightForm,
    check_weight_form,
)
from shohin.backends.inputs import Array, check_inputs
from shohin.backends.targets import format_target_text, read_target
from shohin.errors import ArtifactError, InputError, SpecError, UnsupportedError
from shohin.ir.program import BATCH, InputSpec, Program, output_names
from shohin.ir.serialise import content_hash, save_program
from shohin.ir.shapes import fake_values, first_line


@dataclass(frozen=True)
class ReferenceTarget:
    """PyTorch in this process; it has no options."""


class ReferenceArtifact(Artifact):
    """A program behind the interface of a compiled one.

    Attributes:
        info: what it is, what goes in and what comes out.
        program: the program it runs.
    """

    def __init__(self, program: Program, info: ArtifactInfo) -> None:
        self.program = program
        self.info = info
        program.module.eval()

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run once on numpy arrays.

        Raises:
            InputError: naming the input, what was expected and what was given.
        """
        arrays = check_inputs(self.info.name, self.info.inputs, self.info.batch, inputs)
        with torch.no_grad():
            result = self._compute(arrays)
        results = (result,) if isinstance(result, Tensor) else result
        return [tensor.detach().contiguous().numpy() for tensor in results]

    def _compute(self, arrays: Sequence[Array]) -> Any:
        # PyTorch wants memory that it may write to, though a functional program never does.
        tensors = [torch.tensor(array) for array in arrays]
        try:
            return self.program.module(*tensors)
        except (IndexError, RuntimeError) as error:
            problem = f"cannot run on these numbers: {first_line(error)}"
            raise InputError(self.info.name, problem) from error

    def save(self, path: str | Path, *, form: str | None = None, libc: str | None = None) -> Path:
        """Write the program to a ``.shohin`` file; there is no other form, and no C library.

        Raises:
            SpecError: when a form or a C library is asked for.
            ArtifactError: when the name ends in anything else, or the file cannot be written.
        """
        file = Path(path)
        for option, value in (("form", form), ("libc", libc)):
            if value is not None:
                raise SpecError(option, f"expected none for the reference backend, got '{value}'")
        if file.suffix != ".shohin":
            raise ArtifactError(
                str(file),
                f"expected a name that ends in .shohin, got '{file.suffix}'",
                "the reference backend makes no machine code: compile for the target cpu",
            )
        save_program(self.program, file)
        return file


class ReferenceBackend(Backend):
    """Runs programs in PyTorch."""

    name = "reference"
    targets: ClassVar[Mapping[str, type[Any]]] = {"reference": ReferenceTarget}

    def supports(self, program: Program) -> list[Diagnostic]:
        """Every program is supported."""
        return []

    def compile(
        self,
        program: Program,
        target: str,
        *,
        batch: int = 1,
        weights: WeightForm = "plain",
        progress: Progress | None = None,
    ) -> ReferenceArtifact:
        """Wrap a copy of a program.

        Args:
            program: what to run, of any stage.
            target: ``reference``.
            batch: size of the symbolic batch.
            weights: ``plain``.
            progress: called with (steps done, steps, what comes next).

        Raises:
            SpecError: when the target's text is wrong, the batch not positive, or the weights are
                to be compressed.
            UnsupportedError: when an output is not a tensor.
        """
        options = read_target(target, self.targets)
        check_weight_form(weights, ("plain",))
        if batch < 1:
            raise SpecError("batch", f"expected 1 or more, got {batch}")
        inputs = tuple(
            InputSpec(spec.name, spec.concrete(batch), spec.dtype) for spec in program.inputs
        )
        outputs = _outputs(program, batch)
        info = ArtifactInfo(
            name=program.name,
            target=format_target_text(self.name, options),
            pipeline=", ".join(program.history),
            inputs=inputs,
            outputs=outputs,
            batch=batch if _has_batch(program, outputs, batch) else 0,
            content_hash=content_hash(program),
            tools={"shohin": version("shohin"), "torch": torch.__version__},
        )
        return ReferenceArtifact(program.copy(), info)


def _outputs(program: Program, batch: int) -> tuple[InputSpec, ...]:
    values = fake_values(program.module, program.inputs, batch)
    result = program.graph.output_node().args[0]
    nodes = result if isinstance(result, (tuple, list)) else (result,)
    specs = []
    for name, node in zip(output_names(program, [str(node) for node in nodes]), nodes, strict=True):
        value = values.get(node) if isinstance(node, torch.fx.Node) else node
        if not isinstance(value, Tensor) or not isinstance(node, torch.fx.Node):
            raise UnsupportedError(
                "backend reference", f"expected every output to be a tensor, got '{node}'"
            )
        specs.append(InputSpec(name, tuple(int(size) for size in value.shape), value.dtype))
    return tuple(specs)


def _has_batch(program: Program, outputs: Sequence[InputSpec], batch: int) -> bool:
    """Whether axis 0 of every input and output is the batch."""
    return all(spec.shape[:1] == (BATCH,) for spec in program.inputs) and all(
        spec.shape[:1] == (batch,) for spec in outputs
    )
