"""The pass manager: order checks, transactions, verification, instruments."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace

from shohin.errors import PassError, ShohinError, SpecError, VerifyError
from shohin.ir.program import Fact, Program
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.instruments.base import (
    Instrument,
    PassEnd,
    PassEvent,
    PassFailure,
    PipelineEvent,
    ResumePoint,
)
from shohin.passes.instruments.verifying import Verifying
from shohin.passes.pipeline import format_pass
from shohin.passes.registry import passes_establishing


class PassManager:
    """Runs passes over a program.

    Every pass gets a copy of the program, so that a pass that fails leaves everything as it was.

    Args:
        passes: the passes, in order.
        instruments: what watches them; called in this order.
        verify_each: whether to verify the program before the first and after every pass, and that
            a pass that reports no modification made none.
    """

    def __init__(
        self,
        passes: Iterable[Pass],
        instruments: Iterable[Instrument] = (),
        verify_each: bool = True,
    ) -> None:
        self.passes = tuple(passes)
        self._checks: tuple[Instrument, ...] = (Verifying(),) if verify_each else ()
        self._instruments = tuple(instruments)

    def run(self, program: Program, context: Context) -> Program:
        """Run the passes.

        Args:
            program: the program; it is left as it is.
            context: what the passes are given. Remarks are added to it.

        Returns:
            The program after the last pass, with its facts and history.

        Raises:
            SpecError: when an option of a pass is out of range, or the context lacks what a pass
                needs, before any of them runs.
            PassError: when the order of the passes is impossible, before any of them runs, or when
                a pass raises or gives an invalid program; caused by the original error.
            VerifyError: when the program itself is invalid.
        """
        check_passes(self.passes, program.facts)
        for current in self.passes:
            current.check_context(context)
        start = PipelineEvent(self.passes, program, context)
        offers = [instrument.resume(start) for instrument in self._instruments]
        resumed = max(filter(None, offers), key=_progress, default=ResumePoint(0, program, ()))
        start = replace(start, done=resumed.done)
        for instrument in (*self._checks, *self._instruments):
            instrument.before_pipeline(start)
        context.remarks.extend(resumed.remarks)
        result = self._run_from(resumed, context)
        for instrument in self._instruments:
            instrument.after_pipeline(replace(start, program=result))
        return result

    def _run_from(self, resumed: ResumePoint, context: Context) -> Program:
        program, previous_name = resumed.program, context.pass_name
        try:
            for index in range(resumed.done, len(self.passes)):
                program = self._run_pass(PassEvent(index, self.passes, program, context))
        finally:
            context.pass_name = previous_name
        return program

    def _run_pass(self, event: PassEvent) -> Program:
        for instrument in self._instruments:
            instrument.before_pass(event)
        known = len(event.context.remarks)
        try:
            end = self._attempt(event)
        except BaseException as error:
            self._abandon(event, error, known)
            if not isinstance(error, Exception):
                raise
            raise _failure(event, error) from error
        for instrument in self._instruments:
            instrument.after_pass(end)
        return end.result

    def _attempt(self, event: PassEvent) -> PassEnd:
        started, current, context = time.perf_counter(), event.current, event.context
        known, context.pass_name = len(context.remarks), current.name
        copy = event.program.copy()
        context.analyses.rebind(copy)
        outcome = _checked(current.run(copy, context), current)
        program = _finished(event, outcome)
        context.analyses.carry_over(program, _preserved(event, outcome))
        remarks = tuple(context.remarks[known:])
        end = PassEnd(
            event.index, event.passes, event.program, context, program, outcome.modified, remarks
        )
        for check in self._checks:
            check.after_pass(end)
        return replace(end, seconds=time.perf_counter() - started)

    def _abandon(self, event: PassEvent, error: BaseException, known: int) -> None:
        context = event.context
        remarks = tuple(context.remarks[known:])
        del context.remarks[known:]
        context.analyses.clear()
        failure = PassFailure(event.index, event.passes, event.program, context, error, remarks)
        for instrument in self._instruments:
            instrument.on_error(failure)


def check_passes(passes: Sequence[Pass], facts: frozenset[Fact] = frozenset()) -> None:
    """Check options and order of passes without running them.

    Args:
        passes: the passes, in order.
        facts: what holds before the first.

    Raises:
        SpecError: when an option is out of range.
        PassError: when a pass requires a fact that does not hold where it stands, naming the pass,
            its position, the fact, and which pass establishes it.
    """
    for index, current in enumerate(passes):
        current.validate()
        missing = sorted(current.requires - facts)
        if missing:
            raise _order_error(passes, index, missing[0])
        facts = facts - current.invalidates | current.establishes


def _order_error(passes: Sequence[Pass], index: int, fact: Fact) -> PassError:
    spoilers = [before for before in passes[:index] if fact in before.invalidates]
    lost = f" ('{spoilers[-1].name}' before it invalidates it)" if spoilers else ""
    problem = f"requires '{fact}', which does not hold there{lost}"
    return PassError(_label(passes, index), problem, _order_hint(passes, index, fact))


def _order_hint(passes: Sequence[Pass], index: int, fact: Fact) -> str:
    later = [after.name for after in passes[index + 1 :] if fact in after.establishes]
    if later:
        return f"put '{later[0]}', which establishes it, before '{passes[index].name}'"
    known = passes_establishing(fact)
    names = " or ".join(f"'{name}'" for name in known)
    return f"add {names} before it" if known else "no known pass establishes it"


def _label(passes: Sequence[Pass], index: int) -> str:
    return f"pass '{passes[index].name}' ({index + 1} of {len(passes)})"


def _progress(offer: ResumePoint) -> int:
    return offer.done


def _checked(outcome: object, current: Pass) -> PassResult:
    if not isinstance(outcome, PassResult):
        raise TypeError(f"run returned {type(outcome).__name__}, not PassResult")
    return outcome


def _finished(event: PassEvent, outcome: PassResult) -> Program:
    current, result = event.current, outcome.program
    facts = result.facts - current.invalidates | current.establishes - outcome.failed
    history = (*event.program.history, format_pass(current))
    return replace(result, facts=facts, history=history)


def _preserved(event: PassEvent, outcome: PassResult) -> frozenset[str]:
    return event.current.preserves_analyses if outcome.modified else event.context.analyses.names()


def _failure(event: PassEvent, error: Exception) -> ShohinError:
    if isinstance(error, SpecError):
        return SpecError(_label(event.passes, event.index), str(error))
    before = ", ".join(event.program.history)
    problem = f"raised {type(error).__name__}: {error}"
    if isinstance(error, VerifyError):
        problem = f"gave an invalid program: {error}"
    hint = f"ran before it: {before}" if before else "it was the first to run"
    return PassError(_label(event.passes, event.index), problem, hint)
