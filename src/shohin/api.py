"""The public functions beside `capture`: optimise, measure sensitivity, compile, load."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from shohin.backends.base import Artifact, Progress, WeightForm
from shohin.backends.registry import parse_target
from shohin.batches import Batches, noise
from shohin.errors import SpecError, near_name_hint
from shohin.ir.program import Program
from shohin.ir.serialise import load_program, save_program
from shohin.layers import layers_of, totals_of
from shohin.milliseconds import milliseconds, milliseconds_by_module
from shohin.passes.analyses.sensitivity import DENSITIES, Sensitivity, measure_sensitivity
from shohin.passes.base import Context, Evaluate, Pass, Train
from shohin.passes.instruments.base import Instrument
from shohin.passes.instruments.checkpoint import Checkpoint
from shohin.passes.instruments.drift import Drift
from shohin.passes.instruments.dumping import Dumping
from shohin.passes.instruments.printing import ALL, Printing
from shohin.passes.instruments.progress import ProgressBar
from shohin.passes.instruments.timing import Timing
from shohin.passes.manager import PassManager
from shohin.passes.pipeline import format_pipeline, parse_pipeline
from shohin.progress import StepProgress
from shohin.report import Evaluation, Report, pair_layers, pass_rows

PathLike = str | Path
PassNames = Collection[str] | Literal["all"]
_NOISE_BATCH = 2


@dataclass(frozen=True)
class Result:
    """What `optimize` gives back.

    Attributes:
        program: the optimised program.
        report: what was done, and what it cost before and after.
    """

    program: Program
    report: Report

    def save(self, path: PathLike) -> Path:
        """Write the program to a file that `load` reads; by custom its name ends in ``.shohin``.

        Raises:
            ArtifactError: when the file cannot be written.
        """
        save_program(self.program, path)
        return Path(path)


def optimize(
    program: Program,
    passes: str | Sequence[str | Pass],
    *,
    calibration: Iterable[Tensor | Sequence[Tensor]] = (),
    evaluate: Evaluate | None = None,
    train: Train | None = None,
    seed: int = 0,
    workdir: PathLike | None = None,
    resume: bool = False,
    verify_each: bool = True,
    print_before: PassNames = (),
    print_after: PassNames = (),
    dump: PathLike | None = None,
    drift: bool = True,
    progress: bool = False,
) -> Result:
    """Run passes over a program.

    Args:
        program: the program; it is left as it is.
        passes: the pipeline, as one text, or as a sequence of passes and texts.
        calibration: input batches for passes that look at activations: tuples of one tensor for
            each input of the program, without labels. Read once per use, in order.
        evaluate: measures a module, higher is better; called before and after, and by passes that
            search.
        train: trains a module in place, for passes that retrain; `shohin.Trainer` makes one.
        seed: seed of every random choice that a pass makes.
        workdir: folder for checkpoints, one after every pass.
        resume: go on from the furthest checkpoint in `workdir` that fits.
        verify_each: verify the program before the first and after every pass.
        print_before: names of passes before which the program is printed, or ``"all"``.
        print_after: names of passes after which the program is printed, or ``"all"``.
        dump: folder to write the program and the remarks to after every pass.
        drift: compare outputs around every pass, on the first calibration batch or, where there
            is none, on noise.
        progress: draw a progress bar on standard error, when that is a terminal.

    Raises:
        SpecError: when the pipeline's text, an option or an argument is wrong.
        InputError: when a calibration batch does not fit the program.
        PassError: when the order of the passes is impossible, or a pass fails.
        VerifyError: when the program is invalid.
        ArtifactError: when a checkpoint or dump cannot be written.
    """
    _check_program(program)
    chosen = _parse(passes)
    _check_names(chosen, print_before, print_after)
    if resume and workdir is None:
        raise SpecError("resume", "there is nothing to resume from", "give a workdir")
    batches = Batches(calibration, program.inputs)
    folder = Path(workdir) if workdir is not None else None
    context = Context(
        batches,
        evaluate,
        train,
        seed,
        folder,
        measure=milliseconds,
        profile=milliseconds_by_module,
        resume=resume,
    )
    observed = _Observed(Timing(), _drift(batches, program) if drift else None)
    instruments: list[Instrument | None] = [
        observed.timing,
        observed.drift,
        Printing(_container(print_before), _container(print_after)),
        Dumping(Path(dump)) if dump is not None else None,
        Checkpoint(folder, resume, observed.drift) if folder is not None else None,
        ProgressBar() if progress else None,
    ]
    manager = PassManager(chosen, filter(None, instruments), verify_each)
    before = _measure(evaluate, program)
    result = manager.run(program, context)
    evaluation = _evaluation(before, _measure(evaluate, result))
    return Result(result, _report(program, result, manager, context, observed, evaluation))


@dataclass(frozen=True)
class _Observed:
    """The instruments whose figures the report holds."""

    timing: Timing
    drift: Drift | None


def _drift(batches: Batches, program: Program) -> Drift:
    sample = batches.first()
    if sample is not None:
        return Drift(sample)
    return Drift(noise(program.inputs, _NOISE_BATCH), is_noise=True)


def _report(
    program: Program,
    result: Program,
    manager: PassManager,
    context: Context,
    observed: _Observed,
    evaluation: Evaluation | None,
) -> Report:
    return Report(
        name=program.name,
        pipeline=format_pipeline(manager.passes),
        before=totals_of(program),
        after=totals_of(result),
        layers=pair_layers(layers_of(program), layers_of(result)),
        passes=pass_rows(
            manager.passes,
            [time.seconds for time in observed.timing.times],
            observed.drift.drifts if observed.drift else (),
            context.remarks,
        ),
        remarks=tuple(context.remarks),
        evaluation=evaluation,
        on_noise=observed.drift is not None and observed.drift.is_noise,
    )


def compile(  # noqa: A001 - the name that PyTorch and others have made the common one
    program: Program,
    target: str = "cpu",
    *,
    batch: int = 1,
    weights: WeightForm = "plain",
    progress: Progress | None = None,
) -> Artifact:
    """Compile a program.

    Args:
        program: what to compile.
        target: where it will run, e.g. ``cpu{arch=x86-64-v3 threads=2}`` or
            ``arm{cpu=cortex-a72}``; ``reference`` runs it in PyTorch.
        batch: size of the symbolic batch.
        weights: ``plain``, as kernels read them; or ``compressed``: packed by what pruning and
            sharing left, and made ready once when the binary is first used, by all its threads.
        progress: called with (steps done, steps, what comes next).

    Returns:
        A callable that takes numpy arrays or torch tensors and gives the same. Its `save` writes
        a ``.so``, ``.a``, ``.o`` or, without an ending, an executable.

    Raises:
        SpecError: when the target's text is wrong, the batch not positive, or the backend knows no
            such form of weights.
        UnsupportedError: listing every node that cannot be compiled.
    """
    _check_program(program)
    chosen = parse_target(target)
    return chosen.backend.compile(
        program, chosen.text, batch=batch, weights=weights, progress=progress
    )


def sensitivity(
    program: Program,
    evaluate: Evaluate,
    densities: Sequence[float] = DENSITIES,
    *,
    names: Sequence[str] | None = None,
    workdir: PathLike | None = None,
    resume: bool = True,
    progress: bool = False,
) -> Sensitivity:
    """Measure how far each layer of a program can be pruned (Han et al., arXiv 1506.02626).

    Each convolution and linear map is pruned alone, by magnitude and without retraining, to every
    density, and the program is measured. It is left as it is.

    Args:
        program: the program.
        evaluate: measures a module, higher is better; must not train it.
        densities: shares of a layer's weights to keep, above 0 and at most 1.
        names: names of weights, or shell patterns; None for all.
        workdir: folder that keeps every point once it is measured. Its file belongs to this very
            program, but not to `evaluate`: use another folder when that changes.
        resume: take points from `workdir` instead of measuring them again.
        progress: draw a progress bar on standard error, when that is a terminal.

    Returns:
        The curves; `save_csv` writes them, `draw` draws them.

    Raises:
        SpecError: when a density is out of range, a name matches no weight that can be pruned, or
            `evaluate` gives no number.
        ArtifactError: when the file in `workdir` is malformed or cannot be written.
    """
    _check_program(program)
    options: dict[str, Any] = {"names": names, "workdir": workdir, "resume": resume}
    if not progress:
        return measure_sensitivity(program, evaluate, densities, **options)
    with StepProgress() as bar:
        return measure_sensitivity(program, evaluate, densities, progress=bar, **options)


def load(path: PathLike) -> Program:
    """Read a program that `Result.save` or ``shohin optimize`` wrote. Nothing is run.

    Raises:
        ArtifactError: when the file is missing, truncated, foreign, corrupted or of a newer
            version.
    """
    return load_program(path)


def load_binary(path: PathLike) -> Artifact:
    """Load a shared library that ``binary.save("net.so")`` or ``shohin compile`` wrote.

    Raises:
        ArtifactError: when the file is missing, foreign, truncated, corrupted, of a newer
            version, or for another processor. Nothing of it has run by then.
    """
    from shohin.backends.tvm.binary import Binary

    return Binary.load(path)


def _check_program(program: object) -> None:
    if not isinstance(program, Program):
        hint = "call shohin.capture(model, example_inputs) first"
        problem = f"expected a Program, got {type(program).__name__}"
        raise SpecError("program", problem, hint)


def _parse(passes: object) -> tuple[Pass, ...]:
    if isinstance(passes, str):
        return parse_pipeline(passes)
    if isinstance(passes, Pass):
        return (passes,)
    if isinstance(passes, Sequence):
        return tuple(chain.from_iterable(_parse(item) for item in passes))
    raise SpecError("passes", f"expected a text or passes, got {type(passes).__name__}")


def _check_names(passes: Sequence[Pass], *chosen: PassNames) -> None:
    """Refuse to print around passes that the pipeline does not have."""
    known = tuple(item.name for item in passes)
    for name in chain.from_iterable(names for names in chosen if not isinstance(names, str)):
        if name not in known:
            problem = f"pass '{name}' is not in the pipeline"
            raise SpecError("passes to print around", problem, near_name_hint(name, known))


def _container(names: PassNames) -> Collection[str]:
    return ALL if names == "all" else names  # type: ignore[return-value]


def _measure(evaluate: Evaluate | None, program: Program) -> float | None:
    if evaluate is None:
        return None
    found = evaluate(program.module)
    try:
        return float(found)
    except (TypeError, ValueError) as error:
        problem = f"expected it to return a number, got {type(found).__name__}"
        raise SpecError("evaluate", problem) from error


def _evaluation(before: float | None, after: float | None) -> Evaluation | None:
    return None if before is None or after is None else Evaluation(before, after)
