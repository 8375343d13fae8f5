"""CUDA targets: a generation of NVIDIA GPUs, and the processor of the machine that it is in."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from shohin.backends.tvm.processor import Machine
from shohin.errors import SpecError, near_name_hint

Host: TypeAlias = Literal["x86-64", "aarch64"]

ARCHITECTURES: Mapping[str, str] = MappingProxyType(
    {
        "sm_75": "Turing",
        "sm_80": "Ampere, A100",
        "sm_86": "Ampere, A10 and GeForce 30",
        "sm_87": "Ampere, Jetson Orin",
        "sm_89": "Ada, L4 and GeForce 40",
        "sm_90": "Hopper, H100 and H200",
        "sm_100": "Blackwell, B200",
        "sm_120": "Blackwell, GeForce 50",
    }
)
"""Generations of GPUs, and who is of them."""

_MACHINES: Mapping[Host, Machine] = MappingProxyType({"x86-64": "x86_64", "aarch64": "aarch64"})

_TENSOR_CORES = 80
"""From which generation on tensor cores multiply bytes, and floats in the form of TF32."""

_FAST_TF32 = ("sm_80", "sm_87", "sm_90", "sm_100")
"""Where three products of TF32 take less time than one of floats: by the data sheets, 156 against
19.5 TFLOP/s on the A100; on cards for graphics tensor cores are no faster at it."""


def capability_of(arch: str) -> int:
    """Ten times the compute capability of a generation."""
    return int(arch.removeprefix("sm_"))


@dataclass(frozen=True)
class CudaTarget:
    """An NVIDIA GPU to compile for.

    A binary holds machine code for its generation, and PTX that the driver of later ones compiles
    when the binary is loaded. It needs NVIDIA's driver for CUDA 13 (580 or newer) and nothing else.

    Attributes:
        arch: generation of the GPU: ``sm_75``, ``sm_80``, ``sm_86``, ``sm_87``, ``sm_89``,
            ``sm_90``, ``sm_100`` or ``sm_120``.
        host: processor of the machine that the GPU is in: ``x86-64``, or ``aarch64`` (Jetson,
            Grace).
    """

    arch: str = "sm_80"
    host: Host = "x86-64"

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            hint = near_name_hint(self.arch, tuple(ARCHITECTURES))
            raise SpecError("target cuda", f"unknown arch '{self.arch}'", hint)

    @classmethod
    def variants(cls) -> "tuple[CudaTarget, ...]":
        """The generations, oldest first."""
        return tuple(cls(arch) for arch in ARCHITECTURES)

    @property
    def machine(self) -> Machine:
        """Family of the processor."""
        return _MACHINES[self.host]

    @property
    def capability(self) -> int:
        """Ten times the compute capability."""
        return capability_of(self.arch)

    @property
    def has_tensor_cores(self) -> bool:
        """Whether tensor cores multiply bytes."""
        return self.capability >= _TENSOR_CORES

    @property
    def has_fast_tf32(self) -> bool:
        """Whether floats are worth multiplying on tensor cores."""
        return self.arch in _FAST_TF32

    def describe(self) -> str:
        """Canonical text: ``cuda{arch=sm_90}`` with defaults left out."""
        options = []
        if self.arch != "sm_80":
            options.append(f"arch={self.arch}")
        if self.host != "x86-64":
            options.append(f"host={self.host}")
        return f"cuda{{{' '.join(options)}}}" if options else "cuda"

    def resolved(self) -> str:
        """The generation."""
        return self.arch

    def needs(self) -> tuple[str, ...]:
        """Instruction sets of the processor: those that all of its family have."""
        return ()
