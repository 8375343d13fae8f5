"""A compiler that makes trained neural networks small and fast.

::

    import shohin

    program = shohin.capture(model, example_inputs)
    result = shohin.optimize(program, "fold-bn, prune{density=0.1}", train=finetune)
    print(result.report.text())
    binary = shohin.compile(result.program, target="cpu{threads=2}")
    binary.save("net.so")

Names are imported at first use, so that ``import shohin`` is quick.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shohin.api import (
        Result,
        compile,  # noqa: A004
        load,
        load_binary,
        optimize,
        sensitivity,
    )
    from shohin.backends.base import Artifact
    from shohin.errors import (
        ArtifactError,
        CaptureError,
        InputError,
        PassError,
        ShohinError,
        ShohinWarning,
        SpecError,
        UnsupportedError,
        VerifyError,
    )
    from shohin.ir.capture import capture
    from shohin.ir.program import Program
    from shohin.passes.analyses.sensitivity import Sensitivity
    from shohin.passes.trainer import Trainer
    from shohin.report import Report

__version__ = version("shohin")

_ERRORS = (
    "ArtifactError",
    "CaptureError",
    "InputError",
    "PassError",
    "ShohinError",
    "ShohinWarning",
    "SpecError",
    "UnsupportedError",
    "VerifyError",
)
_HOMES = {
    "Artifact": "shohin.backends.base",
    "Program": "shohin.ir.program",
    "Report": "shohin.report",
    "Result": "shohin.api",
    "Sensitivity": "shohin.passes.analyses.sensitivity",
    "Trainer": "shohin.passes.trainer",
    "capture": "shohin.ir.capture",
    "compile": "shohin.api",
    "load": "shohin.api",
    "load_binary": "shohin.api",
    "optimize": "shohin.api",
    "sensitivity": "shohin.api",
    **dict.fromkeys(_ERRORS, "shohin.errors"),
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "CaptureError",
    "InputError",
    "PassError",
    "Program",
    "Report",
    "Result",
    "Sensitivity",
    "ShohinError",
    "ShohinWarning",
    "SpecError",
    "Trainer",
    "UnsupportedError",
    "VerifyError",
    "capture",
    "compile",
    "load",
    "load_binary",
    "optimize",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'shohin' has no attribute '{name}'")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
