"""The instrument contract: what watches a pipeline from outside of its passes."""

from dataclasses import dataclass

from shohin.ir.program import Program
from shohin.passes.base import Context, Pass
from shohin.passes.remarks import Remark


@dataclass(frozen=True)
class PipelineEvent:
    """A pipeline begins or has ended.

    Attributes:
        passes: all its passes.
        program: the program it was given; after it, the program it made.
        context: what the passes are given.
        done: number of first passes that need not run because their result was resumed.
    """

    passes: tuple[Pass, ...]
    program: Program
    context: Context
    done: int = 0


@dataclass(frozen=True)
class PassEvent:
    """A pass is about to run.

    Attributes:
        index: its position in the pipeline, 0 for the first.
        passes: all passes of the pipeline.
        program: the program before it.
        context: what it is given.
    """

    index: int
    passes: tuple[Pass, ...]
    program: Program
    context: Context

    @property
    def current(self) -> Pass:
        """The pass."""
        return self.passes[self.index]


@dataclass(frozen=True)
class PassEnd(PassEvent):
    """A pass has run.

    Attributes:
        result: the program after it, with its facts and history.
        modified: what the pass said about having changed anything.
        remarks: the remarks it made.
        seconds: wall time of copying, running and verifying.
    """

    result: Program
    modified: bool
    remarks: tuple[Remark, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class PassFailure(PassEvent):
    """A pass has raised, or its result was found to be invalid.

    Attributes:
        error: what was raised.
        remarks: the remarks made until then.
    """

    error: BaseException
    remarks: tuple[Remark, ...]


@dataclass(frozen=True)
class ResumePoint:
    """A result that a pipeline goes on from.

    Attributes:
        done: number of first passes that need not run.
        program: the program after these.
        remarks: the remarks that they made.
    """

    done: int
    program: Program
    remarks: tuple[Remark, ...]


class Instrument:
    """Watches a pipeline. Every hook does nothing unless a subclass says otherwise.

    An instrument must not change the programs it is shown. What it raises ends the pipeline.
    """

    def resume(self, event: PipelineEvent) -> ResumePoint | None:
        """Offer a result to go on from; of several instruments' offers the furthest is taken."""
        return None

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Called once, before the first pass."""

    def before_pass(self, event: PassEvent) -> None:
        """Called before each pass that runs."""

    def after_pass(self, event: PassEnd) -> None:
        """Called after each pass that ran and whose result is valid."""

    def on_error(self, event: PassFailure) -> None:
        """Called when a pass fails; no other hook is called afterwards."""

    def after_pipeline(self, event: PipelineEvent) -> None:
        """Called once, after the last pass."""
