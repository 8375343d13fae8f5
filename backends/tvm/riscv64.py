"""64-bit RISC-V targets, experimental."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from shohin.backends.tvm.processor import Machine, Processor, Tune, check_threads, default_tune

ARCH = "rv64gc"
NEEDS = ("d",)
"""Letters of the extensions that code needs beyond whole numbers."""


@dataclass(frozen=True)
class Riscv64Target(Processor):
    """A 64-bit RISC-V processor to compile for, experimental: ``rv64gc``, without vectors.

    Attributes:
        threads: threads a binary uses unless told otherwise; also what work is split for.
        tune: as for 64-bit ARM; this machine measures only what it can run.
    """

    threads: int = 1
    tune: Tune = field(default_factory=default_tune)

    machine: ClassVar[Machine] = "riscv64"

    def __post_init__(self) -> None:
        check_threads("riscv64", self.threads)

    @classmethod
    def variants(cls) -> "tuple[Riscv64Target, ...]":
        """The only one: what every such processor runs that runs Linux."""
        return (cls(),)

    def describe(self) -> str:
        """Canonical text: ``riscv64{threads=4}`` with defaults left out."""
        return "riscv64" if self.threads == 1 else f"riscv64{{threads={self.threads}}}"

    def resolved(self) -> str:
        """The instruction set."""
        return ARCH

    def needs(self) -> tuple[str, ...]:
        """The extension for floating point."""
        return NEEDS

    def tvm_description(self) -> dict[str, Any]:
        """The target in TVM's form."""
        return {
            "kind": "llvm",
            "mtriple": "riscv64-linux-gnu",
            "mcpu": "generic-rv64",
            "mattr": ["+m", "+a", "+f", "+d", "+c"],
            "mabi": "lp64d",
            "num-cores": self.threads,
            "opt-level": 2,
        }

    def dot_unit(self, bits: Literal[8, 16]) -> tuple[str, int]:
        """Products of widened factors, which need no instruction of their own."""
        return ("widened16" if bits == 16 else "widened8"), 4

    def registers(self) -> int:
        """Half of the 32 that hold a number each: weights and inputs need the others."""
        return 1
