"""x86-64 targets, and whether this machine can run what was compiled for some target."""

import platform
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

from shohin.backends.tvm import arm, armv7, riscv64
from shohin.backends.tvm.cuda.device import why_not
from shohin.backends.tvm.cuda.target import ARCHITECTURES
from shohin.backends.tvm.processor import (
    Machine,
    Processor,
    Tune,
    check_threads,
    default_tune,
    host_machine,
)
from shohin.backends.tvm.processor import host_flags as _host_flags
from shohin.errors import SpecError, near_name_hint

__all__ = ["CpuTarget", "Tune", "host_example", "host_runs"]

_V3 = {"avx2", "fma", "bmi2", "movbe"}
_V4 = {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512cd"}
_NEEDS = {
    "x86-64-v4-vnni": {*_V4, "avx512_vnni"},
    "x86-64-v4": _V4,
    "x86-64-v3-vnni": {*_V3, "avx_vnni"},
    "x86-64-v3": _V3,
    "x86-64-v2": {"ssse3", "sse4_1", "sse4_2"},
}
"""Instruction set flags that a level needs beyond the one below it, the highest level first.

With ``-vnni`` it has sums of products of bytes beyond the level proper."""

_VNNI_SUFFIX = "-vnni"
_VNNI_FEATURES = {"x86-64-v4": "+avx512vnni", "x86-64-v3": "+avxvnni"}

_MOST_TRIALS = 100_000


@dataclass(frozen=True)
class CpuTarget(Processor):
    """An x86-64 processor to compile for.

    Attributes:
        arch: ``native`` or an x86-64 level (``x86-64-v2`` to ``x86-64-v4``; with ``-vnni`` for
            processors of the two highest that multiply bytes).
        threads: threads a binary uses unless told otherwise; also what work is split for.
        tune: whether tile shapes are chosen by a cost model alone (``off``), or by measuring a few
            (``quick``) or many (``full``) that are not in the cache; the environment variable
            SHOHIN_TUNE sets the default.
        metaschedule: schedules that TVM's MetaSchedule may try for each heavy reduction that no
            template covers; 0 for none.
    """

    arch: str = "native"
    threads: int = 1
    tune: Tune = field(default_factory=default_tune)
    metaschedule: int = 0

    machine: ClassVar[Machine] = "x86_64"

    def __post_init__(self) -> None:
        known = ["native", *sorted(_NEEDS)]
        if self.arch not in known:
            raise SpecError(
                "target cpu", f"unknown arch '{self.arch}'", near_name_hint(self.arch, known)
            )
        check_threads("cpu", self.threads)
        if not 0 <= self.metaschedule <= _MOST_TRIALS:
            raise SpecError(
                "target cpu",
                f"expected metaschedule from 0 to {_MOST_TRIALS} trials, got {self.metaschedule}",
            )

    @classmethod
    def variants(cls) -> "tuple[CpuTarget, ...]":
        """The levels, the lowest first."""
        return tuple(cls(arch) for arch in reversed(_NEEDS))

    def describe(self) -> str:
        """Canonical text: ``cpu{arch=native threads=2}`` with defaults left out."""
        options = []
        if self.arch != "native":
            options.append(f"arch={self.arch}")
        if self.threads != 1:
            options.append(f"threads={self.threads}")
        if self.metaschedule:
            options.append(f"metaschedule={self.metaschedule}")
        return f"cpu{{{' '.join(options)}}}" if options else "cpu"

    def resolved(self) -> str:
        """The processor that ``native`` stands for here, else the level."""
        return _host_processor() if self.arch == "native" else self.arch

    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""
        features = {"mattr": [_VNNI_FEATURES[self.level]]} if self.has_vnni() else {}
        return {
            "kind": "llvm",
            "mtriple": "x86_64-unknown-linux-gnu",
            "mcpu": self.level,
            "num-cores": self.threads,
            **features,
        }

    def needs(self) -> tuple[str, ...]:
        """The flags of the level and of those below it."""
        levels = [name for name in _NEEDS if name <= self.level and len(name) == len(self.level)]
        return tuple(sorted(_NEEDS[self.resolved()].union(*(_NEEDS[name] for name in levels))))

    @property
    def level(self) -> str:
        """The x86-64 level."""
        return self.resolved().removesuffix(_VNNI_SUFFIX)

    def has_vnni(self) -> bool:
        """Whether an instruction adds products of bytes to 32-bit sums."""
        return self.resolved().endswith(_VNNI_SUFFIX)

    def has_avx512(self) -> bool:
        """Whether vectors of 16 floats are one register."""
        return self.level == "x86-64-v4"

    def has_fma(self) -> bool:
        """Whether vectors of 8 floats and fused multiply-add exist."""
        return self.level in ("x86-64-v3", "x86-64-v4")

    def registers(self) -> int:
        """Vectors of 16 floats that registers hold: sums, and the weights they are fed from.

        One register is left for an input value in every lane where an instruction cannot take it
        from memory, as only AVX-512 can.
        """
        if self.has_avx512():
            return 30
        return 7 if self.has_fma() else 3

    def dot_unit(self, bits: Literal[8, 16]) -> tuple[str, int]:
        """``vpdpbusd`` where there is one, else ``pmaddubsw``; ``pmaddwd`` for 16 bits."""
        if bits == 16:
            return "maddwd", 16 if self.has_avx512() else 8 if self.has_fma() else 4
        if self.has_vnni():
            return "vnni", 16 if self.has_avx512() else 8
        return "maddubs", 8 if self.has_fma() else 4

    def table_lanes(self) -> int:
        """Floats of a vector that one instruction orders by indices in a register; 0 for none."""
        if self.has_avx512():
            return 16
        return 8 if self.has_fma() else 0

    def byte_tables(self) -> str:
        """``pshufb``."""
        return "pshufb"


@lru_cache(maxsize=1)
def _host_processor() -> str:
    """LLVM's name for a level of this machine; levels rather than models, to be reproducible."""
    for level, needs in _NEEDS.items():
        if host_machine() == "x86_64" and needs <= _host_flags():
            return level
    raise SpecError(
        "target cpu",
        f"this machine ({platform.machine()}) is not an x86-64 one that can be compiled for",
        "give arch=x86-64-v3 or another level, or the target arm",
    )


def host_runs(processor: str) -> str:
    """Why this machine cannot run code for a processor, or an empty text when it can.

    Args:
        processor: what `Processor.resolved` gave; empty where a binary does not say.
    """
    if processor in _NEEDS:
        return _what_lacks("x86_64", _NEEDS[processor])
    if processor in arm.NEEDS:
        return _what_lacks("aarch64", set(arm.NEEDS[processor]))
    if processor in armv7.NEEDS:
        return _what_lacks("arm", set(armv7.NEEDS[processor]))
    if processor == riscv64.ARCH:
        return _what_lacks("riscv64", set(riscv64.NEEDS))
    if processor in ARCHITECTURES:
        return why_not(processor)
    return "which this version of shohin does not know" if processor else ""


def host_example() -> str:
    """A target that this machine can probably run, as a hint."""
    return {"aarch64": "arm", "arm": "armv7"}.get(host_machine(), "cpu{arch=x86-64-v3}")


def _what_lacks(machine: Machine, needs: set[str]) -> str:
    found = host_machine()
    if found != machine:
        return f"this machine is {found}, not {machine}"
    missing = ", ".join(sorted(needs - _host_flags()))
    return f"this machine lacks {missing}" if missing else ""
