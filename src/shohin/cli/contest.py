"""A compiled model against other runtimes, on the same inputs and the same number of threads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from shohin.api import compile, optimize  # noqa: A004 - the public name
from shohin.backends.inputs import count_of, numpy_dtype
from shohin.backends.tvm.binary import Binary
from shohin.batches import noise
from shohin.bench import Timing, measure
from shohin.cli.loading import Model, at_batch
from shohin.errors import SpecError, UnsupportedError
from shohin.passes.instruments.drift import compare
from shohin.rivals import Rival, make_rival
from shohin.tables import Grid

_OURS = "shohin"


@dataclass(frozen=True)
class Contestant:
    """A compiled model, and the PyTorch model that it was made from, where that is known.

    Attributes:
        artifact: the compiled model.
        threads: threads that it uses, and that the others may use.
        inputs: what to run it on.
        module: the model in PyTorch.
    """

    artifact: Binary
    threads: int
    inputs: tuple[Tensor, ...]
    module: nn.Module | None


@dataclass(frozen=True)
class Entry:
    """One runtime's result.

    Attributes:
        name: the runtime.
        time: how long one run takes.
        ratio: that in times of shohin's.
        error: largest difference of an output from PyTorch's, over PyTorch's largest output; None
            where the model in PyTorch is not known.
    """

    name: str
    time: Timing
    ratio: float
    error: float | None


@dataclass(frozen=True)
class Comparison:
    """Runtimes side by side.

    Attributes:
        name: the model's name.
        target: what it was compiled for.
        batch: size of the batch axis, 0 where there is none.
        threads: threads of every runtime.
        entries: results, shohin's first.
        failures: why a runtime could not run the model, by its name.
        own_milliseconds: what the steps of the compiled model take by its own clock, summed.
    """

    name: str
    target: str
    batch: int
    threads: int
    entries: tuple[Entry, ...]
    failures: dict[str, str] = field(default_factory=dict)
    own_milliseconds: float = 0.0

    def title(self) -> str:
        """One line that says what was measured."""
        threads = count_of(self.threads, "thread")
        batch = f", batch {self.batch}" if self.batch else ""
        rounds = self.entries[0].time.rounds
        return f"{self.name}, {self.target}{batch}, {threads}, medians of {rounds} rounds"

    def footer(self) -> str:
        """One line on what the times include."""
        own = f"{self.own_milliseconds:.3f} ms"
        return f"times include the call from Python; the steps of {_OURS}'s binary take {own}"

    def grid(self) -> Grid:
        """The results as a table."""
        rows = tuple(
            (
                entry.name,
                f"{entry.time.median:.3f}",
                f"{entry.time.low:.3f} to {entry.time.high:.3f}",
                f"{entry.ratio:.2f}",
                "" if entry.error is None else f"{entry.error:.1e}",
            )
            for entry in self.entries
        )
        heads = ("runtime", ">ms", ">quartiles", ">times shohin's", ">max relative error")
        return Grid("", heads, rows, optional=(">quartiles",))


def compiled(
    model: Model,
    passes: str | None,
    threads: int,
    batch: int,
    progress: Callable[[int, int, str], None],
) -> Contestant:
    """Compile a model for this machine."""
    program = optimize(model.program, passes, drift=False).program if passes else model.program
    target = f"cpu{{threads={threads}}}"
    artifact = cast("Binary", compile(program, target, batch=batch, progress=progress))
    return Contestant(artifact, threads, at_batch(model, batch), model.module)


def loaded(file: str, model: Model | None, threads: int | None) -> Contestant:
    """Load a compiled model.

    Raises:
        ArtifactError: when the file is missing, foreign or broken.
        SpecError: when the model does not take the same inputs.
    """
    binary = Binary.load(file, threads)
    specs = binary.info.inputs
    if model is None:
        return Contestant(binary, binary.threads, noise(specs), None)
    inputs = at_batch(model, binary.info.batch or 1)
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in inputs]
    if found != [(spec.shape, spec.dtype) for spec in specs]:
        wanted = ", ".join(spec.describe() for spec in specs)
        given = ", ".join(spec.describe() for spec in model.program.inputs)
        raise SpecError("--model", f"takes {given}, but {file} takes {wanted}")
    return Contestant(binary, binary.threads, inputs, model.module)


def compare_with(
    contestant: Contestant, names: Sequence[str], rounds: int, budget: float
) -> Comparison:
    """Measure a compiled model in turns with rivals.

    Args:
        contestant: the compiled model.
        names: the rivals; needs the model in PyTorch.
        rounds: rounds to measure.
        budget: seconds to measure for at most.
    """
    torch.set_num_threads(contestant.threads)
    arrays = [
        np.asarray(tensor.numpy(), dtype=numpy_dtype(spec))
        for tensor, spec in zip(contestant.inputs, contestant.artifact.info.inputs, strict=True)
    ]
    rivals, failures = _rivals(contestant, names)
    functions: dict[str, Callable[[], Any]] = {_OURS: lambda: contestant.artifact.run(arrays)}
    functions |= {rival.name: rival.run for rival in rivals}
    outputs = {_OURS: tuple(torch.from_numpy(found) for found in functions[_OURS]())}
    outputs |= {rival.name: rival.outputs() for rival in rivals}
    times = measure(functions, rounds, budget)
    wanted = _reference(contestant)
    info = contestant.artifact.info
    entries = tuple(
        Entry(
            name,
            time,
            time.median / times[_OURS].median,
            compare(wanted, outputs[name]).relative if wanted else None,
        )
        for name, time in times.items()
    )
    own = sum(time for _, time in contestant.artifact.profile(arrays))
    return Comparison(
        info.name, info.target, info.batch, contestant.threads, entries, failures, own
    )


def _rivals(contestant: Contestant, names: Sequence[str]) -> tuple[list[Rival], dict[str, str]]:
    rivals: list[Rival] = []
    failures: dict[str, str] = {}
    if contestant.module is None:
        return rivals, failures
    for name in names:
        try:
            rival = make_rival(name, contestant.module, contestant.inputs, contestant.threads)
        except UnsupportedError as error:
            failures[name] = error.problem
        else:
            rivals.append(rival)
    return rivals, failures


def _reference(contestant: Contestant) -> tuple[Tensor, ...]:
    """PyTorch's outputs; none where the model in PyTorch is not known."""
    if contestant.module is None:
        return ()
    with torch.inference_mode():
        found = contestant.module(*contestant.inputs)
    return (found,) if isinstance(found, Tensor) else tuple(found)
