"""Searched schedules on disk, so that a reduction is searched once on a machine."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shohin.backends.tvm.generic.region as generic
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.tuning.cache import digest, sources_version
from shohin.ir.encodings import Json
from shohin.ir.files import atomic_path


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        trace: how the fastest schedule is made, None where no schedule became a kernel.
        milliseconds: its time on one thread, infinite where there is none.
        own_milliseconds: that of the kernel that our own rules make.
    """

    trace: Json
    milliseconds: float
    own_milliseconds: float

    @property
    def pays(self) -> bool:
        """Whether the schedule is faster than our own rules."""
        return self.trace is not None and self.milliseconds < self.own_milliseconds


@dataclass(frozen=True)
class Problem:
    """What is searched for; equal problems share their search.

    Attributes:
        text: the function to schedule, as text.
        processor: what it is compiled for.
        threads: threads that its work is split for.
        trials: schedules to measure.
    """

    text: str
    processor: str
    threads: int
    trials: int

    @classmethod
    def of(cls, workload: Any, target: Processor) -> "Problem":
        """The problem of scheduling a PrimFunc for a target."""
        return cls(workload.script(), target.resolved(), target.threads, target.metaschedule)

    @property
    def key(self) -> str:
        """A short name, different for every problem and version of TVM."""
        parts = [self.text, self.processor, self.threads, self.trials, version("apache-tvm")]
        return digest(json.dumps(parts).encode())


@dataclass(frozen=True)
class ScheduleCache:
    """One small file for every problem.

    Attributes:
        folder: where the files are.
    """

    folder: Path

    def read(self, problem: Problem) -> Searched | None:
        """What was found, or None. An unreadable file counts as not there."""
        try:
            content = json.loads(self._path(problem).read_text())
            found = Searched(
                content["trace"],
                float(content["milliseconds"] or math.inf),
                float(content["own_milliseconds"]),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if found.trace is None or isinstance(found.trace, list) else None

    def write(self, problem: Problem, found: Searched) -> None:
        """Keep what a search found."""
        path = self._path(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "problem": problem.text,
            "processor": problem.processor,
            "trials": problem.trials,
            "milliseconds": found.milliseconds if found.trace is not None else None,
            "own_milliseconds": found.own_milliseconds,
            "trace": found.trace,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    def _path(self, problem: Problem) -> Path:
        return self.folder / rules_version() / f"{problem.key}.json"


@lru_cache(maxsize=1)
def rules_version() -> str:
    """Hash of the source of our own rules: comparisons with other rules do not count."""
    return sources_version(Path(str(generic.__file__)).parent)
