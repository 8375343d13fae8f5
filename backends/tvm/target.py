"""CPU targets: what TVM generates code for and what the linker links for."""

import os
import platform
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from shohin.errors import SpecError, near_name_hint

_NEEDS = {
    "x86-64-v4": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd"},
    "x86-64-v3": {"avx2", "fma", "bmi2", "movbe"},
    "x86-64-v2": {"ssse3", "sse4_1", "sse4_2"},
}
"""Instruction set flags that a level needs beyond the one below it, the highest level first."""

Tune = Literal["off", "quick", "full"]


def _default_tune() -> Tune:
    """Quick, unless the environment says otherwise."""
    chosen = os.environ.get("SHOHIN_TUNE", "quick")
    modes: dict[str, Tune] = {"off": "off", "quick": "quick", "full": "full"}
    if chosen not in modes:
        raise SpecError("SHOHIN_TUNE", f"expected off, quick or full, got '{chosen}'")
    return modes[chosen]


@dataclass(frozen=True)
class CpuTarget:
    """A processor to compile for.

    Attributes:
        arch: ``native`` or an x86-64 level (``x86-64-v2`` to ``x86-64-v4``).
        threads: threads a binary uses unless told otherwise; also what work is split for.
        tune: whether tile shapes are chosen by a cost model alone (``off``), or by measuring a few
            (``quick``) or many (``full``) that are not in the cache; the environment variable
            SHOHIN_TUNE sets the default.
    """

    arch: str = "native"
    threads: int = 1
    tune: Tune = field(default_factory=_default_tune)

    def __post_init__(self) -> None:
        known = ["native", *sorted(_NEEDS)]
        if self.arch not in known:
            raise SpecError(
                "target cpu", f"unknown arch '{self.arch}'", near_name_hint(self.arch, known)
            )
        if not 1 <= self.threads <= 256:
            raise SpecError("target cpu", f"expected threads from 1 to 256, got {self.threads}")

    def describe(self) -> str:
        """Canonical text: ``cpu{arch=native threads=2}`` with defaults left out."""
        options = []
        if self.arch != "native":
            options.append(f"arch={self.arch}")
        if self.threads != 1:
            options.append(f"threads={self.threads}")
        return f"cpu{{{' '.join(options)}}}" if options else "cpu"

    def resolved(self) -> str:
        """The processor that ``native`` stands for here, else the level."""
        return _host_processor() if self.arch == "native" else self.arch

    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""
        return {
            "kind": "llvm",
            "mtriple": "x86_64-unknown-linux-gnu",
            "mcpu": self.resolved(),
            "num-cores": self.threads,
        }

    def has_avx512(self) -> bool:
        """Whether vectors of 16 floats are one register."""
        return self.resolved() == "x86-64-v4"

    def has_fma(self) -> bool:
        """Whether vectors of 8 floats and fused multiply-add exist."""
        return self.resolved() in ("x86-64-v3", "x86-64-v4")

    def accumulators(self) -> int:
        """Sums of 16 floats that registers can hold beside weights and inputs."""
        if self.has_avx512():
            return 28
        return 6 if self.has_fma() else 3


@lru_cache(maxsize=1)
def _host_flags() -> frozenset[str]:
    """Instruction set flags of this machine, empty where they cannot be read."""
    info = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not info.exists():
        return frozenset()
    for line in info.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


@lru_cache(maxsize=1)
def _host_processor() -> str:
    """LLVM's name for a level of this machine; levels rather than models, to be reproducible."""
    for level, needs in _NEEDS.items():
        if needs <= _host_flags():
            return level
    raise SpecError(
        "target cpu",
        f"this machine ({platform.machine()}) is not an x86-64 one that can be compiled for",
        "give arch=x86-64-v3 or another level",
    )


def host_runs(processor: str) -> str:
    """Why this machine cannot run code for a processor, or an empty text when it can."""
    missing = _NEEDS.get(processor, set()) - _host_flags()
    return f"this machine lacks {', '.join(sorted(missing))}" if missing else ""
