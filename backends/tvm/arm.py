"""64-bit ARM targets: processors with NEON, 32 registers of four floats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias, get_args

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

DotProducts: TypeAlias = Literal["auto", "on", "off"]
"""Whether ``sdot`` is used: where the core has it, always, or never."""

_DOTPROD = "asimddp"


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
        dotprod: whether sums of products of bytes are formed by ``sdot``: where the core has it
            (``auto``), always (``on``), or never (``off``).
    """

    cpu: str = "generic"
    threads: int = 1
    tune: Tune = field(default_factory=default_tune)
    dotprod: DotProducts = "auto"

    machine: ClassVar[Machine] = "aarch64"

    def __post_init__(self) -> None:
        if self.cpu not in _CORES:
            hint = near_name_hint(self.cpu, tuple(_CORES))
            raise SpecError("target arm", f"unknown cpu '{self.cpu}'", hint)
        check_threads("arm", self.threads)

    @classmethod
    def variants(cls) -> "tuple[ArmTarget, ...]":
        """The cores, and those of no name with dot products."""
        return (*(cls(cpu) for cpu in _CORES), cls(dotprod="on"))

    def describe(self) -> str:
        """Canonical text: ``arm{cpu=cortex-a72 threads=4}`` with defaults left out."""
        options = []
        if self.cpu != "generic":
            options.append(f"cpu={self.cpu}")
        if self.threads != 1:
            options.append(f"threads={self.threads}")
        if self.dotprod != "auto":
            options.append(f"dotprod={self.dotprod}")
        return f"arm{{{' '.join(options)}}}" if options else "arm"

    def resolved(self) -> str:
        """The core, or ``armv8-a``; with what is used beyond it, or left out."""
        core = _CORES[self.cpu]
        if self._has_sdot() == (_DOTPROD in core.needs):
            return core.instructions
        return f"{core.instructions}+{'dotprod' if self._has_sdot() else 'nodotprod'}"

    def needs(self) -> tuple[str, ...]:
        """The flags of the core."""
        core = _CORES[self.cpu].needs
        return tuple(sorted(core | {_DOTPROD} if self._has_sdot() else core - {_DOTPROD}))

    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""
        return {
            "kind": "llvm",
            "mtriple": "aarch64-linux-gnu",
            "mcpu": _CORES[self.cpu].scheduled_as,
            "mattr": ["+dotprod" if self._has_sdot() else "-dotprod"],
            "num-cores": self.threads,
            # Level 3 unrolls the loop over channels of a tile at the border in full, and then
            # moves so many loads ahead that half of the registers are spilled.
            "opt-level": 2,
        }

    def dot_unit(self, bits: Literal[8, 16]) -> tuple[str, int]:
        """``sdot`` where there is one, else ``smull``."""
        if bits == 16:
            return "smull16", 4
        return "sdot" if self._has_sdot() else "smull8", 4

    def byte_tables(self) -> str:
        """``tbl``."""
        return "tbl"

    def registers(self) -> int:
        """Seven of the eight that there are: a product takes its input from a register."""
        return 7

    def _has_sdot(self) -> bool:
        if self.dotprod == "auto":
            return _DOTPROD in _CORES[self.cpu].needs
        return self.dotprod == "on"


NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        target.resolved(): target.needs()
        for cpu in _CORES
        for target in (ArmTarget(cpu, dotprod=dot) for dot in get_args(DotProducts))
    }
)
"""Flags of ``/proc/cpuinfo`` that code needs, by `ArmTarget.resolved`."""
