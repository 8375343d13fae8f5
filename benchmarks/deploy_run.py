"""Runs programs that shohin made, here or under an emulator, and looks at what they need."""

import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from instructions import EMULATORS

_STARTS = 31


def run_program(program: Path, kind: str, image: Any) -> Any:
    """The one output of a program.

    Args:
        program: the executable.
        kind: of the target it was compiled for.
        image: its one input.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("x.npy", "y.npy")]
        np.save(files[0], image)
        emulator = [EMULATORS[kind]] if kind in EMULATORS else []
        command = [*emulator, program, files[0], "--output", files[1], "--threads", "1"]
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        return np.load(files[1])


def memory_and_start(program: Path) -> tuple[int, float]:
    """Peak resident bytes of a run, and median milliseconds from start to end of a run on zeros."""
    times, peaks = [], []
    for _ in range(_STARTS):
        began = time.perf_counter()
        command = [str(program), "--benchmark", "1", "--threads", "1"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        times.append(1e3 * (time.perf_counter() - began))
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("memory"))
        peaks.append(1024 * int(line.split()[1]))
    return max(peaks), statistics.median(times)
