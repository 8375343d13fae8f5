"""The backend contract: what compiles a program, and what comes out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args, overload

import numpy as np
import torch

from shohin.backends.inputs import Array, as_array, count_batches
from shohin.errors import SpecError
from shohin.ir.program import InputSpec, Program

Progress: TypeAlias = Callable[[int, int, str], None]

WeightForm: TypeAlias = Literal["plain", "compressed"]
"""How a binary holds its weights: as kernels read them, or coded until it is first used."""


@dataclass(frozen=True)
class Diagnostic:
    """A node that a backend cannot compile.

    Attributes:
        node: its name.
        operator: what it calls.
        reason: why not.
    """

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class StepInfo:
    """One step of a compiled program.

    Attributes:
        label: source module and what is computed.
        kernel: the kernel that computes it, with its tile where it has one.
        macs: multiply-accumulates that the model asks for, padding left out; 0 for other work.
        bytes: bytes of the arrays it reads and writes.
        note: why it is this kernel, where there was a choice; empty where there was none.
    """

    label: str
    kernel: str
    macs: int
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class ArtifactInfo:
    """What an artifact says of itself.

    Attributes:
        name: the model's name.
        target: canonical text of the target.
        pipeline: canonical text of the passes that made the program.
        inputs: what goes in, at the compiled batch size.
        outputs: what comes out.
        batch: the compiled batch size, 0 where the model has no batch axis.
        content_hash: hash of the program it was compiled from.
        tools: versions of what made it.
        needs: instruction sets without which it does not run, as Linux calls them.
        steps: what it does, in order, where the backend knows.
        weights: how it holds its weights.
        weight_bytes: what they take in the file; 0 where the backend does not know.
    """

    name: str
    target: str
    pipeline: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    batch: int
    content_hash: str
    tools: Mapping[str, str]
    needs: tuple[str, ...] = ()
    steps: tuple[StepInfo, ...] = ()
    weights: WeightForm = "plain"
    weight_bytes: int = 0


@dataclass(frozen=True)
class TargetVariant:
    """A processor that a kind of target can be compiled for.

    Attributes:
        text: the target.
        facts: what it uses there, by what people call it, e.g. ``products of bytes``.
        problem: why this machine cannot run what is compiled for it; empty where it can.
    """

    text: str
    facts: Mapping[str, str]
    problem: str


class Artifact(ABC):
    """A compiled program.

    Attributes:
        info: what it is, what goes in and what comes out.
    """

    info: ArtifactInfo

    @overload
    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]: ...

    @overload
    def __call__(self, *inputs: Array) -> Array | tuple[Array, ...]: ...

    def __call__(self, *inputs: Any) -> Any:
        """Run once on numpy arrays or torch tensors; the results are of the same kind.

        Contiguous arrays are read where they lie; others are copied first.

        Raises:
            InputError: naming the input, what was expected and what was given.
        """
        results = self.run([as_array(item, i) for i, item in enumerate(inputs)])
        if any(isinstance(item, torch.Tensor) for item in inputs):
            tensors = tuple(torch.from_numpy(result) for result in results)
            return tensors[0] if len(tensors) == 1 else tensors
        return results[0] if len(results) == 1 else tuple(results)

    def run_batches(self, inputs: Sequence[Array]) -> list[Array]:
        """Run over inputs whose axis 0 is a multiple of the compiled batch, joining the results.

        Raises:
            InputError: when the model has no batch axis or the sizes do not divide.
        """
        batch = self.info.batch
        count = count_batches(self.info.name, batch, inputs)
        parts = [
            self.run([array[i * batch : (i + 1) * batch] for array in inputs]) for i in range(count)
        ]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    @abstractmethod
    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run once.

        Args:
            inputs: one array per input, of the shapes and types of `info.inputs`.

        Returns:
            One array per output.

        Raises:
            InputError: when an array does not fit.
        """

    @abstractmethod
    def save(self, path: str | Path, *, form: str | None = None, libc: str | None = None) -> Path:
        """Write the artifact to a file, whose name's ending chooses the form.

        Args:
            path: file to write.
            form: which, where the backend has several and the ending shall not choose.
            libc: the C library to use, where the backend has a choice.

        Raises:
            SpecError: when there is no such form or C library.
        """


class Backend(ABC):
    """Compiles programs for some kinds of target.

    Class attributes:
        name: what it is called.
        targets: the kinds of target it compiles for, each with the dataclass of its options.
    """

    name: ClassVar[str]
    targets: ClassVar[Mapping[str, type[Any]]]

    def variants(self, kind: str) -> tuple[TargetVariant, ...]:
        """The processors of a kind of target, plainest first; none where there is no choice."""
        return ()

    @abstractmethod
    def supports(self, program: Program) -> list[Diagnostic]:
        """The nodes that this backend cannot compile; empty when it can compile the program."""

    @abstractmethod
    def compile(
        self,
        program: Program,
        target: str,
        *,
        batch: int = 1,
        weights: WeightForm = "plain",
        progress: Progress | None = None,
    ) -> Artifact:
        """Compile a program.

        Args:
            program: what to compile.
            target: text of the target, e.g. ``cpu{threads=2}``.
            batch: size of the symbolic batch.
            weights: how the artifact holds its weights.
            progress: called with (steps done, steps, what comes next).

        Raises:
            SpecError: when the target's text is wrong, the batch not positive, or the backend
                knows no such form of weights.
            UnsupportedError: listing every node that cannot be compiled.
        """


def check_weight_form(
    weights: str, known: Sequence[WeightForm] = get_args(WeightForm)
) -> WeightForm:
    """Refuse a form of weights that a backend does not know.

    Raises:
        SpecError: naming those it knows.
    """
    for form in known:
        if weights == form:
            return form
    expected = " or ".join(f"'{form}'" for form in known)
    raise SpecError("weights", f"expected {expected}, got '{weights}'")
