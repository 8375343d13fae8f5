"""The tuner: gives a planner the variant of each kernel that it should use."""

from collections.abc import Callable
from dataclasses import dataclass, field

from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.processor import Processor, Tune
from shohin.backends.tvm.target import host_runs
from shohin.backends.tvm.tuning.cache import Measurement, TuningCache
from shohin.backends.tvm.tuning.measure import measure_kernels
from shohin.backends.tvm.tuning.schedules import ScheduleCache
from shohin.backends.tvm.tuning.searcher import Searcher

VARIANTS: dict[Tune, int] = {"off": 1, "quick": 5, "full": 24}
"""Most variants that are compared for one kernel; the cost model orders them."""

WORTH_MEASURING = 500_000
"""Operations below which a kernel takes so few microseconds that its tile does not matter."""

_GROUP = 40
"""Variants compiled together: enough to share start-up, few enough to show progress."""

Progress = Callable[[int, int, str], None]


@dataclass
class Tuner:
    """Chooses variants, from the cache where it knows the kernel.

    A tuner is used twice: planning once collects the kernels that are not in the cache, and once
    `measure` has run, planning again gets the best of each.

    Attributes:
        target: where the code will run.
        cache: measurements on disk.
        missing: kernels that were asked for and are not measured.
        searcher: searches schedules of what no template covers, where the target asks for that.
    """

    target: Processor
    cache: TuningCache = field(default_factory=TuningCache.default)
    missing: dict[str, tuple[Kernel, ...]] = field(default_factory=dict)
    searcher: Searcher = field(init=False)

    def __post_init__(self) -> None:
        self.searcher = Searcher(self.target, ScheduleCache(self.cache.folder / "schedules"))

    @property
    def tune(self) -> Tune:
        """How much to measure: nothing for a processor whose code cannot run here."""
        return "off" if host_runs(self.target.resolved()) else self.target.tune

    @property
    def measures(self) -> bool:
        """Whether choices depend on measurements, so that planning once is not enough."""
        return self.tune != "off" or self.searcher.trials > 0

    def choose(self, kernel: Kernel, timed: bool = False) -> Kernel:
        """The variant to use; the cost model's favourite where nothing was measured.

        Args:
            kernel: any variant.
            timed: whether its time will be compared with that of another kernel, so that it is
                measured even if it is small or has no other variant.
        """
        variants = kernel.variants(self.target.registers())[: VARIANTS[self.tune]]
        idle = len(variants) <= 1 or kernel.operations < WORTH_MEASURING
        if self.tune == "off" or (idle and not timed):
            return variants[0] if variants else kernel
        known = self.cache.read(kernel, self.target)
        times = known.milliseconds if known else {}
        if any(variant.tile_text() not in times for variant in variants):
            self.missing[kernel.problem()] = variants
            return variants[0]
        return min(variants, key=lambda variant: times[variant.tile_text()])

    def milliseconds(self, kernel: Kernel) -> float | None:
        """Time of the variant that `choose` gives, None where it was not measured."""
        known = self.cache.read(kernel, self.target) if self.tune != "off" else None
        return known.milliseconds.get(kernel.tile_text()) if known else None

    def measure(self, progress: Progress) -> bool:
        """Measure what is missing and keep the results.

        Args:
            progress: called with (variants or trials done, variants or trials, text).

        Returns:
            Whether anything was missing.

        Raises:
            SpecError: when packages that a search needs are not installed.
        """
        found = self.searcher.search(progress)
        work = [(problem, v) for problem, variants in self.missing.items() for v in variants]
        times: dict[str, dict[str, float]] = {}
        for start in range(0, len(work), _GROUP):
            progress(start, len(work), "tuning")
            group = work[start : start + _GROUP]
            measured = measure_kernels([variant for _, variant in group], self.target)
            for (problem, variant), milliseconds in zip(group, measured, strict=True):
                times.setdefault(problem, {})[variant.tile_text()] = milliseconds
        for problem, variants in self.missing.items():
            known = self.cache.read(variants[0], self.target)
            merged = {**(known.milliseconds if known else {}), **times[problem]}
            self.cache.write(variants[0], self.target, Measurement(merged))
        self.missing.clear()
        return found or bool(work)
