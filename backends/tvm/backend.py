"""The TVM backend: compiles programs for x86-64 and ARM processors."""

from collections.abc import Iterator, Mapping
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
from shohin.backends.tvm.arm import ArmTarget
from shohin.backends.tvm.armv7 import Armv7Target
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.riscv64 import Riscv64Target
from shohin.backends.tvm.target import CpuTarget, host_runs
from shohin.errors import UnsupportedError
from shohin.ir.program import Program


class TvmBackend(Backend):
    """Compiles with shohin's kernel templates, and with TVM what no template takes."""

    name = "tvm"
    targets: ClassVar[Mapping[str, type[Any]]] = {
        "cpu": CpuTarget,
        "arm": ArmTarget,
        "armv7": Armv7Target,
        "riscv64": Riscv64Target,
    }

    def variants(self, kind: str) -> tuple[TargetVariant, ...]:
        """The processors of a kind of target, and the instructions that kernels use there."""
        processors: tuple[Processor, ...] = self.targets[kind].variants()
        return tuple(
            TargetVariant(one.describe(), _instructions(one), host_runs(one.resolved()))
            for one in processors
        )

    def supports(self, program: Program) -> list[Diagnostic]:
        """The nodes that neither a kernel template nor TVM takes, at batch 1."""
        return list(_diagnose(program))

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
            target: e.g. ``cpu{arch=x86-64-v3 threads=2}`` or ``arm{cpu=cortex-a72}``.
            batch: size of the symbolic batch.
            weights: ``plain``, as kernels read them; or ``compressed``, coded until the first
                instance is created.
            progress: called with (steps done, steps, what comes next).

        Raises:
            SpecError: when the target's text is wrong, the batch not positive, or there is no
                such form of weights.
            UnsupportedError: listing every node that cannot be compiled.
        """
        options = read_target(target, self.targets)
        check_weight_form(weights)
        # TVM takes a second to import, which loading and describing binaries can do without.
        from shohin.backends.tvm.compile import compile_program

        return compile_program(program, options, batch, progress, weights=weights)


_NAMES = {
    "vnni": "vpdpbusd",
    "maddubs": "pmaddubsw",
    "maddwd": "pmaddwd",
    "smull8": "smull",
    "smull16": "smlal",
    "vmull8": "vmull",
    "vmull16": "vmlal",
}
"""Instructions for sums of products, where kernels call them otherwise."""


def _instructions(processor: Processor) -> dict[str, str]:
    """What kernels use on a processor."""
    dots = [processor.dot_unit(8), processor.dot_unit(16)]
    names = [_NAMES.get(name, name) for name, _ in dots]
    return {
        "needs": " ".join(processor.needs()),
        "floats": str(dots[1][1]),
        "int8": names[0],
        "int16": names[1],
        "tables": "vpermps" if processor.table_lanes() else processor.byte_tables(),
    }


def _diagnose(program: Program) -> Iterator[Diagnostic]:
    from shohin.backends.tvm.generic.region import RegionError, compile_region, unsupported_nodes
    from shohin.backends.tvm.lowering.lower import HANDLERS
    from shohin.backends.tvm.lowering.operations import Region
    from shohin.backends.tvm.lowering.select import Selector

    try:
        operations = Selector(program, 1, HANDLERS).select().operations
    except UnsupportedError as error:
        yield Diagnostic(error.where, "", error.problem)
        return
    for region in (operation for operation in operations if isinstance(operation, Region)):
        inputs = [(value.shape, value.dtype) for value in region.values]
        try:
            compile_region(region.module, inputs)
        except RegionError:
            for node, reason in unsupported_nodes(region.module, inputs):
                yield Diagnostic(node.name, str(node.target), reason)
