"""The backend contract: what compiles a program, and what comes out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from shohin.ir.encodings import Json
from shohin.ir.program import InputSpec, Program

Array: TypeAlias = NDArray[np.generic]
ArrayLike = TypeVar("ArrayLike", Array, torch.Tensor)


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
    """

    name: str
    target: str
    pipeline: str
    inputs: tuple[InputSpec, ...]
    outputs: tuple[InputSpec, ...]
    batch: int
    content_hash: str
    tools: Mapping[str, str]


class Artifact(ABC):
    """A compiled program."""

    info: ArtifactInfo

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
    def save(self, path: str | Path) -> Path:
        """Write the artifact to a file, whose name's ending chooses the form."""


class Backend(ABC):
    """Compiles programs for one kind of target."""

    name: ClassVar[str]

    @abstractmethod
    def supports(self, program: Program) -> list[Diagnostic]:
        """The nodes that this backend cannot compile; empty when it can compile the program."""

    @abstractmethod
    def compile(
        self, program: Program, target: str, *, batch: int = 1, options: Mapping[str, Json] = {}
    ) -> Artifact:
        """Compile a program.

        Args:
            program: what to compile.
            target: text of the target, e.g. ``cpu{threads=2}``.
            batch: size of the symbolic batch.
            options: the backend's own options.

        Raises:
            UnsupportedError: listing every node that cannot be compiled.
        """
