"""Bisection: which pass, and which layer in it, breaks a program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shohin.ir.program import Program
from shohin.passes.analysis import AnalysisCache
from shohin.passes.base import Batch, Context, Evaluate, Pass
from shohin.passes.instruments.drift import compare, outputs
from shohin.passes.manager import PassManager
from shohin.passes.pipeline import format_pass, format_pipeline
from shohin.passes.remarks import Outcome, Remark


@dataclass(frozen=True)
class Check:
    """What makes a program broken.

    Attributes:
        name: what the error is, e.g. ``largest absolute error``.
        error: how far a program is from the one wanted; NaN counts as broken.
        limit: the largest error of a program that is not broken.
    """

    name: str
    error: Callable[[Program], float]
    limit: float

    def is_broken(self, error: float) -> bool:
        """Whether an error is beyond the limit."""
        return not error <= self.limit


@dataclass(frozen=True)
class Probe:
    """One run of the search.

    Attributes:
        passes: number of first passes that ran.
        sites: number of first sites that the last of them was allowed to change; None for all.
        error: error of the result.
        broken: whether that is beyond the limit.
    """

    passes: int
    sites: int | None
    error: float
    broken: bool


@dataclass(frozen=True)
class BisectResult:
    """What a bisection found.

    Attributes:
        pipeline: canonical text of all passes.
        culprit: canonical text of the first pass whose result is broken; None when none is.
        index: its position in the pipeline, 0 for the first.
        site: the node or weight whose change breaks the program; None when no single change does,
            as when the pass breaks it even where it may change nothing.
        layer: dotted path of the site's source module, empty where unknown.
        check: name of the error.
        limit: the largest error of a program that is not broken.
        probes: every run, in order, with the error seen.
    """

    pipeline: str
    culprit: str | None
    index: int | None
    site: str | None
    layer: str
    check: str
    limit: float
    probes: tuple[Probe, ...]

    @property
    def runs(self) -> int:
        """Number of runs made."""
        return len(self.probes)

    def __str__(self) -> str:
        lines = [f"{self._verdict()}; {self.runs} runs", f"{self.check}, limit {self.limit:.3g}:"]
        for probe in self.probes:
            sites = "" if probe.sites is None else f", its first {probe.sites} sites"
            state = "broken" if probe.broken else "good"
            lines.append(f"  {probe.error:<12.4g}{state:<8}first {probe.passes} passes{sites}")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.culprit is None or self.index is None:
            return f"no pass of '{self.pipeline}' breaks the program"
        place = f"{self.index + 1} of {self.probes[0].passes}"
        where = f"pass '{self.culprit}' ({place}) breaks the program"
        if self.site is None:
            return f"{where}, at no single site"
        return f"{where} at '{self.site}'" + (f" (layer {self.layer})" if self.layer else "")


def output_check(reference: Program, batch: Batch, tolerance: float) -> Check:
    """Broken when an output differs from the reference's by more than a tolerance.

    Args:
        reference: the program whose outputs are right.
        batch: the inputs to compare on.
        tolerance: largest absolute difference of an element that is allowed.
    """
    wanted = outputs(reference.module, batch)

    def error(program: Program) -> float:
        return compare(wanted, outputs(program.module, batch)).absolute

    return Check("largest absolute error", error, tolerance)


def accuracy_check(reference: Program, evaluate: Evaluate, drop: float) -> Check:
    """Broken when the user's measure falls by more than a given drop.

    Args:
        reference: the program whose measure is right.
        evaluate: the measure, higher is better.
        drop: the largest fall that is allowed.
    """
    wanted = evaluate(reference.module)
    return Check("drop", lambda program: wanted - evaluate(program.module), drop)


def bisect(
    program: Program, passes: Sequence[Pass], context: Context, check: Check
) -> BisectResult:
    """Find the first pass whose result is broken, and the first site whose change breaks it.

    Both are binary searches: over the prefixes of the pipeline, and over the sites that the pass
    remarked as changed, in their order. They find *a* culprit also where errors are not monotone:
    a place where the result turns from good to broken.

    Args:
        program: the program that the pipeline is given; not broken itself.
        passes: the pipeline.
        context: what the passes are given; its calibration is read in every run. Its remarks and
            analyses are left alone.
        check: what makes a program broken.

    Raises:
        PassError: when a pass fails.
    """
    return _Search(program, tuple(passes), context, check).run()


class _Search:
    def __init__(
        self, program: Program, passes: tuple[Pass, ...], context: Context, check: Check
    ) -> None:
        self._passes = passes
        self._context = context
        self._check = check
        self._prefixes: dict[int, Program] = {0: program}
        self._probes: list[Probe] = []

    def run(self) -> BisectResult:
        count = len(self._passes)
        if not self._is_prefix_broken(count):
            return self._result(None, None)
        culprit = _first_broken(count, self._is_prefix_broken)
        return self._result(culprit - 1, self._find_site(culprit))

    def _is_prefix_broken(self, length: int) -> bool:
        start = max(known for known in self._prefixes if known <= length)
        result, _ = self._apply(start, length, None)
        self._prefixes[length] = result
        return self._probe(length, None, result)

    def _find_site(self, culprit: int) -> Remark | None:
        _, remarks = self._apply(culprit - 1, culprit, None)
        sites = _changed_sites(remarks)
        names = [site.node for site in sites]

        def is_broken(count: int) -> bool:
            result, _ = self._apply(culprit - 1, culprit, frozenset(names[:count]))
            return self._probe(culprit, count, result)

        if not sites or is_broken(0) or not is_broken(len(sites)):
            return None
        return sites[_first_broken(len(sites), is_broken) - 1]

    def _apply(
        self, start: int, end: int, sites: frozenset[str] | None
    ) -> tuple[Program, list[Remark]]:
        context = replace(
            self._context,
            analyses=AnalysisCache(),
            remarks=[],
            site_filter=_narrowed(self._context, sites),
        )
        prefix = self._prefixes[start]
        manager = PassManager(self._passes[start:end])
        return manager.run(prefix, context), context.remarks

    def _probe(self, passes: int, sites: int | None, program: Program) -> bool:
        error = self._check.error(program)
        broken = self._check.is_broken(error)
        self._probes.append(Probe(passes, sites, error, broken))
        return broken

    def _result(self, index: int | None, site: Remark | None) -> BisectResult:
        return BisectResult(
            format_pipeline(self._passes),
            None if index is None else format_pass(self._passes[index]),
            index,
            site.node if site else None,
            site.module if site else "",
            self._check.name,
            self._check.limit,
            tuple(self._probes),
        )


def _first_broken(count: int, is_broken: Callable[[int], bool]) -> int:
    """The least number that is broken, given that 0 is good and `count` is broken."""
    good, broken = 0, count
    while broken - good > 1:
        middle = (good + broken) // 2
        if is_broken(middle):
            broken = middle
        else:
            good = middle
    return broken


def _changed_sites(remarks: Sequence[Remark]) -> list[Remark]:
    changed = [remark for remark in remarks if remark.outcome is Outcome.CHANGED]
    return list({remark.node: remark for remark in reversed(changed)}.values())[::-1]


def _narrowed(context: Context, sites: frozenset[str] | None) -> Callable[[str], bool] | None:
    if sites is None:
        return context.site_filter
    return lambda name: name in sites and context.allows(name)
