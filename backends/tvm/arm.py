"""64-bit ARM targets: processors with NEON, 32 registers of four floats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from shohin.backends.tvm.processor import Machine, Processor, Tune, check_threads, default_tune
from shohin.errors import SpecError, near_name_hint


@dataclass(frozen=True)
class _Core:
    """A processor core.

    Attributes:
        instructions: name of its instruction set, or of the core where it has one of its own.
        scheduled_as: LLVM's name for the core to order instructions for.
        needs: flags of ``/proc/cpuinfo`` that its code needs.
    """

    instructions: str
    scheduled_as: str
    needs: frozenset[str] = frozenset({"asimd"})


_V8_2 = frozenset({"asimd", "asimddp", "asimdhp", "asimdrdm"})

# For the Cortex-A53 by name, LLVM unrolls loops eightfold and spills a tenth of the sums; its
# generic model is of a core that runs instructions in order as well.
_CORES: Mapping[str, _Core] = MappingProxyType(
    {
        "generic": _Core("armv8-a", "generic"),
        "cortex-a53": _Core("cortex-a53", "generic"),
        "cortex-a72": _Core("cortex-a72", "cortex-a72"),
        "cortex-a76": _Core("cortex-a76", "cortex-a76", _V8_2),
        "neoverse-n1": _Core("neoverse-n1", "neoverse-n1", _V8_2),
    }
)

NEEDS: Mapping[str, frozenset[str]] = MappingProxyType(
    {core.instructions: core.needs for core in _CORES.values()}
)
"""Flags of ``/proc/cpuinfo`` that code needs, by `ArmTarget.resolved`."""


@dataclass(frozen=True)
class ArmTarget(Processor):
    """A 64-bit ARM processor to compile for.

    Attributes:
        cpu: ``generic``, which runs on every one, or the core to make it fast on:
            ``cortex-a53``, ``cortex-a72``, ``cortex-a76`` or ``neoverse-n1``.
        threads: threads a binary uses unless told otherwise; also what work is split for.
        tune: whether tile shapes are chosen by a cost model alone (``off``), or by measuring a few
            (``quick``) or many (``full``); only a machine that can run the code measures. The
            environment variable SHOHIN_TUNE sets the default.
    """

    cpu: str = "generic"
    threads: int = 1
    tune: Tune = field(default_factory=default_tune)

    machine: ClassVar[Machine] = "aarch64"

    def __post_init__(self) -> None:
        if self.cpu not in _CORES:
            hint = near_name_hint(self.cpu, tuple(_CORES))
            raise SpecError("target arm", f"unknown cpu '{self.cpu}'", hint)
        check_threads("arm", self.threads)

    def describe(self) -> str:
        """Canonical text: ``arm{cpu=cortex-a72 threads=4}`` with defaults left out."""
        options = []
        if self.cpu != "generic":
            options.append(f"cpu={self.cpu}")
        if self.threads != 1:
            options.append(f"threads={self.threads}")
        return f"arm{{{' '.join(options)}}}" if options else "arm"

    def resolved(self) -> str:
        """The core, or ``armv8-a``."""
        return _CORES[self.cpu].instructions

    def needs(self) -> tuple[str, ...]:
        """The flags of the core."""
        return tuple(sorted(_CORES[self.cpu].needs))

    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""
        return {
            "kind": "llvm",
            "mtriple": "aarch64-linux-gnu",
            "mcpu": _CORES[self.cpu].scheduled_as,
            "num-cores": self.threads,
            # Level 3 unrolls the loop over channels of a tile at the border in full, and then
            # moves so many loads ahead that half of the registers are spilled.
            "opt-level": 2,
        }

    def dot_unit(self, bits: Literal[8, 16]) -> tuple[str, int]:
        """``sdot`` where there is one, else ``smull``."""
        if bits == 16:
            return "smull16", 4
        return "sdot" if _CORES[self.cpu].needs >= _V8_2 else "smull8", 4

    def registers(self) -> int:
        """Seven of the eight that there are: a product takes its input from a register."""
        return 7
