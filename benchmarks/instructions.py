"""Instructions that a program for ARM executes, counted by a plugin of QEMU's user emulation.

Counts are exact and the same on every machine. They are no times: what an instruction takes depends
on the processor, and what waits for memory is not seen at all.
"""

import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

EMULATORS = {"arm": "qemu-aarch64", "armv7": "qemu-arm"}
"""By kind of target."""

_SOURCE = Path(__file__).with_suffix(".c")
_FEW, _MANY, _TWICE = 1, 3, 2
"""Runs of which the difference is taken: start and decoding cancel out. There are as many warm-up
runs before them, up to ten."""


def missing() -> str:
    """What is lacking here to count instructions, or an empty text."""
    needed = ("gcc", *EMULATORS.values())
    lacking = [name for name in needed if shutil.which(name) is None]
    return f"{', '.join(lacking)} not installed" if lacking else ""


def instructions_per_run(program: Path, kind: str) -> float:
    """Instructions of one run of a model, on one thread.

    Args:
        program: an executable that shohin made.
        kind: of the target it was compiled for, ``arm`` or ``armv7``.
    """
    few, many = (_count([program, "--benchmark", str(n)], kind) for n in (_FEW, _MANY))
    return (many - few) / (_TWICE * (_MANY - _FEW))


def instructions_to_start(program: Path, kind: str) -> int:
    """Instructions until a model could run for the first time: loading and decoding weights."""
    once = instructions_per_run(program, kind)
    return int(_count([program, "--benchmark", "1"], kind) - _TWICE * _FEW * once)


def _count(command: list[str | Path], kind: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        emulator = [EMULATORS[kind], "-d", "plugin", "-D", log, "-plugin", _plugin()]
        words = [*emulator, *command, "--threads", "1"]
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
        return int(log.read_text().split()[-1])


@lru_cache(maxsize=1)
def _plugin() -> Path:
    folder = Path(tempfile.mkdtemp())
    library = folder / "instructions.so"
    command = ["gcc", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", _SOURCE, "-o", library]
    subprocess.run([str(word) for word in command], check=True)
    return library
