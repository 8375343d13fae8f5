"""The searcher: gives a planner searched schedules of what no template covers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from shohin.backends.tvm.generic import metaschedule
from shohin.backends.tvm.generic.expressions import RefusedError
from shohin.backends.tvm.generic.quiet import quiet
from shohin.backends.tvm.generic.region import RegionCall
from shohin.backends.tvm.generic.schedule import RangedFunction
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.target import host_runs
from shohin.backends.tvm.tuning.measure import compute, measure_functions
from shohin.backends.tvm.tuning.schedules import Problem, ScheduleCache, Searched

WORTH_SEARCHING = 4_000_000
"""Operations below which our own rules take so little time that a search is not worth its own."""

_FINALISTS = 3
"""Fastest trials that are measured again beside our own kernel."""

_HOPELESS = 3.0
"""Times our own kernel's milliseconds that a trial may take before its measuring ends."""

_TOLERANCE = 1e-3
"""What sums in another order may differ by, relative and absolute."""

Progress = Callable[[int, int, str], None]


@dataclass
class Searcher:
    """Replaces kernels of regions by faster ones that a search found.

    Used twice like the tuner: planning once collects what is not in the cache, and once `search`
    has run, planning again gets what it found.

    Attributes:
        target: where the code will run, and how many trials each search has.
        cache: searches on disk.
        missing: calls that were asked for and are not searched.
    """

    target: Processor
    cache: ScheduleCache
    missing: dict[Problem, RegionCall] = field(default_factory=dict)
    _known: dict[Problem, RangedFunction | None] = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """Schedules to measure: none for a processor whose code cannot run here."""
        return 0 if host_runs(self.target.resolved()) else self.target.metaschedule

    def choose(self, call: RegionCall) -> RegionCall:
        """The call to make; the given one where none is known to be faster."""
        if not self.trials or call.workload is None or call.operations < WORTH_SEARCHING:
            return call
        problem = Problem.of(call.workload.function(), self.target)
        if problem not in self._known and not self._recall(problem, call):
            self.missing[problem] = call
            return call
        known = self._known[problem]
        if known is None:
            return call
        return replace(
            call,
            function=known.function,
            arguments=call.workload.arguments,
            extent=known.extent,
            label=f"{call.label}, searched",
        )

    def search(self, progress: Progress) -> bool:
        """Search what is missing and keep the results.

        Args:
            progress: called with (trials done, trials, text).

        Returns:
            Whether anything was missing.

        Raises:
            SpecError: when packages that the search needs are not installed.
        """
        if not self.missing:
            return False
        metaschedule.check_packages()
        total = len(self.missing) * self.trials
        for index, (problem, call) in enumerate(self.missing.items()):
            start = index * self.trials

            def report(done: int, start: int = start) -> None:
                progress(start + done, total, "searching schedules")

            self.cache.write(problem, self._search_one(call, report))
        self.missing.clear()
        return True

    def _recall(self, problem: Problem, call: RegionCall) -> bool:
        """Whether the cache knows the problem. A trace that does not fit counts as not there."""
        found = self.cache.read(problem)
        if found is None or call.workload is None:
            return False
        try:
            self._known[problem] = (
                metaschedule.replay(call.workload.function(), found.trace, self.target)
                if found.pays
                else None
            )
        except RefusedError:
            return False
        return True

    def _search_one(self, call: RegionCall, report: Callable[[int], None]) -> Searched:
        if call.workload is None:
            raise ValueError(f"{call.label} has no workload")
        workload = call.workload.function()
        own = RangedFunction(call.function, call.extent)
        (limit,) = measure_functions([own], self.target)
        trials = metaschedule.search(
            workload,
            self.target,
            self.trials,
            lambda functions: self._measure(functions, _HOPELESS * limit),
            report,
        )
        traces = [trial.trace for trial in trials[:_FINALISTS]]
        finalists = [metaschedule.replay(workload, trace, self.target) for trace in traces]
        right = self._check(own, call, finalists)
        own_time, *times = measure_functions([own, *finalists], self.target)
        timed = [(t, i) for i, t in enumerate(times) if right[i]]
        if not timed:
            return Searched(None, math.inf, own_time)
        best, index = min(timed)
        return Searched(traces[index], best, own_time)

    def _check(
        self, own: RangedFunction, call: RegionCall, found: Sequence[RangedFunction]
    ) -> list[bool]:
        """Whether each function found computes what our own kernel does."""
        if call.workload is None or not found:
            return []
        names = call.workload.arguments
        functions = [(own, call.arguments), *((function, names) for function in found)]
        expected, *results = compute(functions, names[-1], self.target)
        return [
            np.allclose(result, expected, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True)
            for result in results
        ]

    def _measure(self, functions: Sequence[RangedFunction], hopeless: float) -> list[float | None]:
        """Milliseconds of each function, None for one that cannot be built."""
        if not functions:
            return []
        try:
            with quiet():
                return list(measure_functions(functions, self.target, hopeless=hopeless))
        # Now and then LLVM or TVM's lowering fails on a schedule, with errors of any kind.
        except Exception:
            if len(functions) == 1:
                return [None]
            return [time for one in functions for time in self._measure([one], hopeless)]
