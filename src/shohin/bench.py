"""Fair timing of several functions: in turns, so that whatever slows the machine slows them all."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

_WARM_UP_CALLS = 3
_BLOCK_SECONDS = 20e-3
_MOST_CALLS = 200
_PAUSE_SECONDS = 30e-3
"""Thread pools of other runtimes go on polling for some ten milliseconds after their last call."""
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """How long a function takes.

    Attributes:
        median: median over the rounds, in milliseconds.
        low: lower quartile, in milliseconds.
        high: upper quartile, in milliseconds.
        rounds: number of rounds measured.
    """

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int = 30, budget: float = 10.0
) -> dict[str, float]:
    """Median milliseconds of each function, measured in turns; see `measure`."""
    return {name: timing.median for name, timing in measure(functions, rounds, budget).items()}


def measure(
    functions: Mapping[str, Callable[[], object]], rounds: int = 30, budget: float = 10.0
) -> dict[str, Timing]:
    """How long each function takes, measured in turns.

    Every function is warmed up first. In each round every function has its turn, in an order that
    is reversed from round to round: after a pause, in which other functions' threads go to sleep,
    it is called once untimed and then for some milliseconds, of which the mean is kept.

    Args:
        functions: what to call, by name.
        rounds: number of rounds.
        budget: seconds after which no further round begins, once there are three.
    """
    names = list(functions)
    calls = {name: _calls_per_block(functions[name]) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    with _without_collection():
        for index in range(max(1, rounds)):
            if index >= _LEAST_ROUNDS and time.perf_counter() > end:
                break
            for name in names if index % 2 == 0 else reversed(names):
                samples[name].append(_block(functions[name], calls[name]))
    return {name: _summarise(samples[name]) for name in names}


def _calls_per_block(function: Callable[[], object]) -> int:
    for _ in range(_WARM_UP_CALLS):
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
    return max(1, min(_MOST_CALLS, round(_BLOCK_SECONDS / max(seconds, 1e-9))))


def _block(function: Callable[[], object], calls: int) -> float:
    """Mean milliseconds of a number of calls."""
    time.sleep(_PAUSE_SECONDS)
    function()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls * 1e3


def _summarise(samples: list[float]) -> Timing:
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from running in the middle of a measurement."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
