"""What the innermost loops of kernels for ARM should take, by LLVM's models of processors.

``llvm-mca`` (of the Debian package ``llvm``) knows how many instructions of each kind a core starts
in a cycle and how long they take. It sees neither caches nor memory, so its figures are the best
that a loop could do.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tvm
from tables import Table, save

from shohin.backends.registry import parse_target
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.lowering.lower import lower as plan_program
from shohin.backends.tvm.objects import lower
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.ir.program import Program

CORES = ("cortex-a53", "cortex-a72", "cortex-a76")
"""Cores of 64 bits: LLVM has no model of a 32-bit one that knows all instructions of the loops."""

_ROUNDS = 200
_LABEL = re.compile(r"^(\.?L\w+):")
_BRANCH = re.compile(r"^\s+(?:b(?:\.?\w\w)?|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.?L\w+)\s*$")
_PRODUCTS: Sequence[tuple[str, int]] = (
    (r"fmla\s+v\d+\.4s", 4),
    (r"sdot\s", 16),
    (r"smull2?\s+v\d+\.8h", 8),
    (r"smlal2?\s+v\d+\.4s", 4),
    (r"smull2?\s+v\d+\.4s", 4),
)
"""Products of an instruction, by how it is written."""


@dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        lines: its instructions.
    """

    lines: tuple[str, ...]

    @property
    def products(self) -> int:
        """Multiply-accumulates of an iteration."""
        return sum(
            count
            for line in self.lines
            for pattern, count in _PRODUCTS
            if re.search(rf"^\s+{pattern}", line)
        )


def missing() -> str:
    """What is lacking here, or an empty text."""
    return "" if shutil.which("llvm-mca") else "llvm-mca not installed"


def measure_loops(programs: Mapping[str, Program]) -> None:
    """The heaviest loop of the heaviest kernel of every form of a network, on every core."""
    rows = [row for core in CORES for row in _rows(core, programs)]
    headings = (
        "core", "form", "kernel", "instructions", "products", "cycles", "products a cycle",
        "instructions a cycle",
    )  # fmt: skip
    table = Table("Innermost loops by llvm-mca, an iteration each", headings)
    for row in rows:
        table.add(
            row["core"],
            row["form"],
            row["kernel"],
            str(row["instructions"]),
            str(row["products"]),
            f"{row['cycles']:.1f}",
            f"{row['products'] / row['cycles']:.2f}",
            f"{row['instructions'] / row['cycles']:.2f}",
        )
    save("deploy_loops", rows, [table])


def _rows(core: str, programs: Mapping[str, Program]) -> Iterator[dict[str, Any]]:
    options = parse_target(f"arm{{cpu={core}}}").options
    for form, program in programs.items():
        kernel = _heaviest(program, options)
        loop = max(_loops(_assembly(kernel, options)), key=lambda one: one.products)
        yield {
            "core": core,
            "form": form,
            "kernel": f"{kernel.family} {kernel.tile_text()}".strip(),
            "instructions": len(loop.lines),
            "products": loop.products,
            "cycles": _cycles(loop, core),
        }


def _heaviest(program: Program, target: Processor) -> Kernel:
    with TemporaryDirectory() as folder:
        plan = plan_program(
            program, Tuner(target), 1, Path(folder) / "constants", lambda done, total, text: None
        )
    calls = [call for call in plan.calls if isinstance(call.kernel, Kernel)]
    found: Kernel = max(calls, key=lambda call: call.macs).kernel
    return found


def _assembly(kernel: Kernel, target: Processor) -> str:
    module = lower({"kernel": kernel.build()}, target)
    described = tvm.target.Target(target.tvm_description())
    build = tvm.get_global_func("target.build.llvm")
    return str(build(module, described.with_host(described)).inspect_source("asm"))


def _loops(assembly: str) -> Iterator[Loop]:
    """Loops without another loop inside."""
    lines = assembly.splitlines()
    labels = {found[1]: at for at, line in enumerate(lines) if (found := _LABEL.match(line))}
    ends = [
        (labels[found[1]], at)
        for at, line in enumerate(lines)
        if (found := _BRANCH.match(line)) and labels.get(found[1], at) < at
    ]
    for start, end in ends:
        if not any(start < other < end for other, _ in ends):
            body = lines[start + 1 : end + 1]
            yield Loop(tuple(one for one in body if re.match(r"^\s+[a-z]", one)))


def _cycles(loop: Loop, core: str) -> float:
    """Cycles of an iteration, when many follow each other."""
    # A branch to a label that is not there would be refused; it costs an instruction all the same.
    body = [*loop.lines[:-1], "\tsubs x16, x16, #1"]
    command = ["llvm-mca", "-mtriple=aarch64", f"-mcpu={core}", f"-iterations={_ROUNDS}"]
    text = "\n".join(body) + "\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"deploy: llvm-mca refuses a loop for {core}: {done.stderr[:500]}")
    (total,) = re.findall(r"Total Cycles:\s+(\d+)", done.stdout)
    return int(total) / _ROUNDS
