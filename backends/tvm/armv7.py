"""32-bit ARM targets: processors with NEON, 16 registers of four floats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from shohin.backends.tvm.processor import Machine, Processor, Tune, check_threads, default_tune
from shohin.errors import SpecError, near_name_hint

_FUSED = "vfpv4"
_LATER = ("idiva", "neon", _FUSED)
_CORES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "generic": ("neon",),
        "cortex-a7": _LATER,
        "cortex-a9": ("neon",),
        "cortex-a15": _LATER,
    }
)
"""Flags of ``/proc/cpuinfo`` that the code for a core needs."""

_GENERIC = "armv7-a"


@dataclass(frozen=True)
class Armv7Target(Processor):
    """A 32-bit ARM processor with NEON to compile for, or a 64-bit one that runs a 32-bit system.

    Attributes:
        cpu: ``generic``, which runs on every one, or the core to make it fast on: ``cortex-a7``,
            ``cortex-a9`` or ``cortex-a15``.
        threads: threads a binary uses unless told otherwise; also what work is split for.
        tune: as for 64-bit ARM; this machine measures only what it can run.
    """

    cpu: str = "generic"
    threads: int = 1
    tune: Tune = field(default_factory=default_tune)

    machine: ClassVar[Machine] = "arm"

    def __post_init__(self) -> None:
        if self.cpu not in _CORES:
            hint = near_name_hint(self.cpu, tuple(_CORES))
            raise SpecError("target armv7", f"unknown cpu '{self.cpu}'", hint)
        check_threads("armv7", self.threads)

    @classmethod
    def variants(cls) -> "tuple[Armv7Target, ...]":
        """The cores."""
        return tuple(cls(cpu) for cpu in _CORES)

    def describe(self) -> str:
        """Canonical text: ``armv7{cpu=cortex-a7 threads=4}`` with defaults left out."""
        options = []
        if self.cpu != "generic":
            options.append(f"cpu={self.cpu}")
        if self.threads != 1:
            options.append(f"threads={self.threads}")
        return f"armv7{{{' '.join(options)}}}" if options else "armv7"

    def resolved(self) -> str:
        """``armv7-a``, with the core where it has instructions of its own."""
        return _GENERIC if self.cpu == "generic" else f"{_GENERIC}+{self.cpu}"

    def needs(self) -> tuple[str, ...]:
        """The flags of the core."""
        return _CORES[self.cpu]

    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""
        fused = "+vfp4" if _FUSED in _CORES[self.cpu] else "-vfp4"
        # For the Cortex-A7 by name, LLVM multiplies and adds in two instructions.
        scheduled_as = "cortex-a15" if self.cpu == "cortex-a7" else self.cpu
        return {
            "kind": "llvm",
            "mtriple": "armv7a-linux-gnueabihf",
            "mcpu": scheduled_as,
            "mattr": ["+neon", fused],
            "mfloat-abi": "hard",
            "num-cores": self.threads,
            # At level 2 lanes of `exchange` come from the wrong places.
            "opt-level": 3,
        }

    def dot_unit(self, bits: Literal[8, 16]) -> tuple[str, int]:
        """``vmull``."""
        return ("vmull16" if bits == 16 else "vmull8"), 4

    def byte_tables(self) -> str:
        """``vtbl``."""
        return "vtbl"

    def registers(self) -> int:
        """Three of the four that there are: a product takes its input from a register."""
        return 3


NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {Armv7Target(cpu).resolved(): Armv7Target(cpu).needs() for cpu in _CORES}
)
"""Flags of ``/proc/cpuinfo`` that code needs, by `Armv7Target.resolved`."""
