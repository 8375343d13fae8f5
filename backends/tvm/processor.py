"""What a processor that kernels are compiled for tells the rest of the backend."""

import os
import platform
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from shohin.errors import SpecError

Machine = Literal["x86_64", "aarch64", "arm", "riscv64"]
"""Families of processors, by Linux's names for them."""

Tune = Literal["off", "quick", "full"]

MOST_THREADS = 256

_OTHER_NAMES = {"AMD64": "x86_64", "arm64": "aarch64", "armv7l": "arm", "armv8l": "arm"}


class Processor(ABC):
    """A processor to compile for; the options of a target are the fields of a subclass.

    Attributes:
        machine: the family that it belongs to.
        threads: threads a binary uses unless told otherwise; also what work is split for.
        tune: how much is measured to choose tile shapes.
        metaschedule: schedules to try for each heavy reduction that no template covers.
    """

    machine: ClassVar[Machine]
    threads: int
    tune: Tune
    metaschedule: int = 0

    @classmethod
    @abstractmethod
    def variants(cls) -> "tuple[Processor, ...]":
        """The processors that can be chosen, plainest first."""

    @abstractmethod
    def describe(self) -> str:
        """Canonical text of the target, with defaults left out."""

    @abstractmethod
    def resolved(self) -> str:
        """Name of the exact processor or level, the same on every machine that compiles."""

    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """Instruction sets that the code needs, as ``/proc/cpuinfo`` calls them, in order."""

    @abstractmethod
    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""

    @abstractmethod
    def registers(self) -> int:
        """Vectors of 16 floats that registers hold: sums, and the weights they are fed from.

        One register is left for an input value in every lane where an instruction cannot take it
        from memory.
        """

    @abstractmethod
    def dot_unit(self, bits: Literal[8, 16]) -> tuple[str, int]:
        """Instructions for sums of products of integers: their name in `kernels.dots`, and lanes.

        Args:
            bits: width of the factors.
        """

    def table_lanes(self) -> int:
        """Floats of a vector that one instruction orders by indices in a register; 0 for none."""
        return 0

    def byte_tables(self) -> str:
        """What takes bytes out of a table in registers, by its name in `kernels.byte_tables`."""
        return ""


def check_threads(target: str, threads: int) -> None:
    """Refuse a number of threads that no binary can have.

    Args:
        target: the kind of target, e.g. ``cpu``.
        threads: how many.

    Raises:
        SpecError: when it is not from 1 to 256.
    """
    if not 1 <= threads <= MOST_THREADS:
        raise SpecError(
            f"target {target}", f"expected threads from 1 to {MOST_THREADS}, got {threads}"
        )


def default_tune() -> Tune:
    """Quick, unless the environment variable SHOHIN_TUNE says otherwise.

    Raises:
        SpecError: when it says nothing that is known.
    """
    chosen = os.environ.get("SHOHIN_TUNE", "quick")
    modes: dict[str, Tune] = {"off": "off", "quick": "quick", "full": "full"}
    if chosen not in modes:
        raise SpecError("SHOHIN_TUNE", f"expected off, quick or full, got '{chosen}'")
    return modes[chosen]


def host_machine() -> str:
    """Linux's name for this machine's family of processors."""
    found = platform.machine()
    return _OTHER_NAMES.get(found, found)


@lru_cache(maxsize=1)
def host_flags() -> frozenset[str]:
    """Instruction set flags of this machine, empty where they cannot be read."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    for line in info.read_text().splitlines():
        title, _, value = line.partition(":")
        if title.strip() in ("flags", "Features"):
            return frozenset(value.split())
        if title.strip() == "isa":
            letters, _, _ = value.strip().removeprefix("rv64").partition("_")
            return frozenset(letters)
    return frozenset()
