"""The CUDA backend: compiles programs for NVIDIA GPUs."""

from collections.abc import Mapping
from typing import Any, ClassVar

from shohin.backends.base import (
    Backend,
    Diagnostic,
    Progress,
    TargetVariant,
    WeightForm,
    check_weight_form,
)
from shohin.backends.targets import read_target
from shohin.backends.tvm.backend import TvmBackend
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.cuda.device import why_not
from shohin.backends.tvm.cuda.target import ARCHITECTURES, CudaTarget
from shohin.ir.program import Program


class CudaBackend(Backend):
    """Compiles with shohin's kernel templates for GPUs, and with TVM what no template takes."""

    name = "cuda"
    targets: ClassVar[Mapping[str, type[Any]]] = {"cuda": CudaTarget}

    def variants(self, kind: str) -> tuple[TargetVariant, ...]:
        """The generations of GPUs, and what kernels use there."""
        return tuple(
            TargetVariant(one.describe(), _facts(one), why_not(one.arch))
            for one in CudaTarget.variants()
        )

    def supports(self, program: Program) -> list[Diagnostic]:
        """The nodes that neither a kernel template nor TVM takes, at batch 1."""
        # TVM takes a second to import, which describing targets can do without.
        from shohin.backends.tvm.cuda.lowering.lower import half_precision

        reason = "half precision has no kernels"
        half = [Diagnostic(node.name, str(node.target), reason) for node in half_precision(program)]
        return [*half, *TvmBackend().supports(program)]

    def compile(
        self,
        program: Program,
        target: str,
        *,
        batch: int = 1,
        weights: WeightForm = "plain",
        progress: Progress | None = None,
    ) -> Binary:
        """Compile a program to a binary, held in a temporary folder until it is saved.

        Args:
            program: what to compile.
            target: e.g. ``cuda{arch=sm_90}``.
            batch: size of the symbolic batch.
            weights: ``plain``, as kernels read them; or ``compressed``, coded until the first
                instance is created.
            progress: called with (steps done, steps, what comes next).

        Raises:
            SpecError: when the target's text is wrong, the batch not positive, or there is no
                such form of weights.
            UnsupportedError: listing every node that cannot be compiled.
            ArtifactError: when NVIDIA's compiler is not installed.
        """
        options = read_target(target, self.targets)
        check_weight_form(weights)
        from shohin.backends.tvm.cuda.compile import compile_program

        return compile_program(program, options, batch, progress, weights=weights)


def _facts(target: CudaTarget) -> dict[str, str]:
    return {
        "GPUs": ARCHITECTURES[target.arch],
        "floats": "mma of 3 TF32" if target.has_fast_tf32 else "fma",
        "int8": "mma" if target.has_tensor_cores else "dp4a",
    }
