import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from arm_code import AARCH64, inner_loops, machine_of
from arm_nets import IMAGES, ROWS, small
from emulated import EMULATED, check_emulated, run_emulated
from small_nets import RandomNet, captured, compare, net
from torch import nn

import shohin
from shohin.backends.registry import parse_target
from shohin.backends.tvm import target as host
from shohin.backends.tvm.arm import ArmTarget
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import ConvTile
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.matmul import MatMul, MatrixTile
from shohin.backends.tvm.objects import emit_object
from shohin.backends.tvm.target import host_runs
from shohin.backends.tvm.tuning import tuner as tuning
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.errors import ArtifactError, SpecError

_EMULATOR = shutil.which("qemu-aarch64")


_CPUS = ("generic", "cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (ArmTarget(), "arm"),
        (ArmTarget("cortex-a72"), "arm{cpu=cortex-a72}"),
        (ArmTarget("neoverse-n1", 16), "arm{cpu=neoverse-n1 threads=16}"),
        (ArmTarget("cortex-a76", 4, dotprod="off"), "arm{cpu=cortex-a76 threads=4 dotprod=off}"),
    ],
)
def test_describe(target: ArmTarget, text: str) -> None:
    assert target.describe() == text
    assert parse_target(text).options == target


def test_unknown_cpu() -> None:
    with pytest.raises(SpecError) as caught:
        parse_target("arm{cpu=cortex-a73}")
    first, *shown = str(caught.value).splitlines()
    assert first.startswith("target: unknown cpu 'cortex-a73'; did you mean 'cortex-a7")
    assert shown == ["  arm{cpu=cortex-a73}", "          ^"]


@pytest.mark.parametrize(
    ("target", "resolved", "unit", "needs"),
    [
        (ArmTarget(), "armv8-a", "smull8", ("asimd",)),
        (ArmTarget(dotprod="on"), "armv8-a+dotprod", "sdot", ("asimd", "asimddp")),
        (ArmTarget(dotprod="off"), "armv8-a", "smull8", ("asimd",)),
        (
            ArmTarget("cortex-a76"),
            "cortex-a76",
            "sdot",
            ("asimd", "asimddp", "asimdhp", "asimdrdm"),
        ),
        (
            ArmTarget("cortex-a76", dotprod="off"),
            "cortex-a76+nodotprod",
            "smull8",
            ("asimd", "asimdhp", "asimdrdm"),
        ),
    ],
)
def test_dot_products(target: ArmTarget, resolved: str, unit: str, needs: tuple[str, ...]) -> None:
    assert target.resolved() == resolved
    assert target.dot_unit(8) == (unit, 4)
    assert target.needs() == needs
    assert host_runs(resolved) == "this machine is x86_64, not aarch64"


def test_threads_out_of_bounds() -> None:
    with pytest.raises(SpecError, match=r"^target arm: expected threads from 1 to 256, got 0$"):
        ArmTarget(threads=0)


@pytest.mark.parametrize("cpu", _CPUS)
def test_what_this_machine_is_not(cpu: str) -> None:
    assert host_runs(ArmTarget(cpu).resolved()) == "this machine is x86_64, not aarch64"


def test_on_a_machine_with_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_machine", lambda: "aarch64")
    monkeypatch.setattr(host, "_host_flags", lambda: frozenset({"fp", "asimd", "crc32"}))
    assert host_runs("cortex-a72") == ""
    assert host_runs("cortex-a76") == "this machine lacks asimddp, asimdhp, asimdrdm"
    assert host_runs("x86-64-v2") == "this machine is aarch64, not x86_64"
    assert Tuner(ArmTarget("cortex-a72", tune="full")).tune == "full"
    assert Tuner(ArmTarget("neoverse-n1", tune="full")).tune == "off"


def test_a_processor_of_a_later_version() -> None:
    assert host_runs("cortex-z1") == "which this version of shohin does not know"


def _conv(filters: int, size: int) -> Kernel:
    geometry = Geometry((size, size), (3, 3), (1, 1), (1, 1, 1, 1))
    return Conv2d(1, 64, filters, geometry, 1, False, ConvTile(1, 1))


_DENSE: dict[str, Kernel] = {
    "conv": _conv(64, 56),
    "conv with many filters": _conv(256, 14),
    "linear": MatMul(1, 64, 512, 512, True, True, MatrixTile(1, 1)),
    "matrix product": MatMul(2, 50, 64, 50, False, False, MatrixTile(1, 1)),
}


@pytest.mark.parametrize("cpu", _CPUS)
def test_sums_stay_in_registers(cpu: str, tmp_path: Path) -> None:
    target = ArmTarget(cpu)
    tiles = [kernel.variants(target.registers())[:3] for kernel in _DENSE.values()]
    kernels = [variant.build() for variants in tiles for variant in variants]
    emit_object({f"k{i}": kernel for i, kernel in enumerate(kernels)}, target, tmp_path / "k.o")
    assert machine_of(tmp_path / "k.o") == AARCH64
    loops = [loop for loop in inner_loops(tmp_path / "k.o") if loop.products >= 12]
    assert len(loops) > len(kernels)
    assert [loop.spills for loop in loops] == [0] * len(loops)
    # The others take a number that was loaded into every lane, which costs nothing more.
    assert sum(loop.by_lane for loop in loops) >= 0.6 * sum(loop.products for loop in loops)


@pytest.fixture(scope="module")
def binary() -> Binary:
    return compile_program(captured(small(), (3, 6, 6)), ArmTarget("cortex-a72", 2), 2)


@pytest.mark.parametrize("name", ["net.so", "net.o", "net"])
def test_forms(binary: Binary, name: str, tmp_path: Path) -> None:
    assert machine_of(binary.save(tmp_path / name)) == AARCH64


def test_static_library(binary: Binary, tmp_path: Path) -> None:
    assert binary.save(tmp_path / "net.a").read_bytes().startswith(b"!<arch>\n")
    assert "arm{cpu=cortex-a72 threads=2}" in (tmp_path / "net.h").read_text()


_CALLER = """
#include "net.h"
#include <stdio.h>

int main(void) {
    static float x[216], y[10];
    for (int i = 0; i < 216; ++i) x[i] = (float)(i % 7) - 3.0f;
    shohin_instance *instance;
    if (net_create(2, &instance) != SHOHIN_OK) return 1;
    const void *inputs[] = {x};
    void *outputs[] = {y};
    if (net_run(instance, inputs, outputs) != SHOHIN_OK) return 2;
    net_destroy(instance);
    for (int i = 0; i < 10; ++i) printf("%a\\n", y[i]);
    return 0;
}
"""


@EMULATED
@pytest.mark.parametrize("suffix", [".o", ".a"])
def test_a_c_program_links_it(binary: Binary, suffix: str, tmp_path: Path) -> None:
    binary.save(tmp_path / f"net{suffix}")
    (tmp_path / "main.c").write_text(_CALLER)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    # By these flags the C library is that of executables: no other has to be built.
    command += ["-Os", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables"]
    command += ["main.c", f"net{suffix}", "-pthread", "-lm", "-o", "main"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    command = [str(_EMULATOR), str(tmp_path / "main")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = torch.tensor([float.fromhex(line) for line in done.stdout.split()]).reshape(2, 5)
    image = (torch.arange(216) % 7 - 3).float().reshape(2, 3, 6, 6)
    with torch.no_grad():
        compare(found, small()(image), tolerance=1e-5)


def test_sizes_are_known_without_running(binary: Binary) -> None:
    assert binary.constant_bytes >= 4 * (3 * 9 * 20 + 320 * 5)
    assert binary.arena_bytes > 0


_REFUSAL = (
    "was compiled for cortex-a72, this machine is x86_64, not aarch64; run it on the machine it is "
    "for, or compile it for this one, e.g. with cpu{arch=x86-64-v3}"
)


def test_running_it_here_is_refused(binary: Binary, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as caught:
        binary(np.zeros((2, 3, 6, 6), np.float32))
    assert str(caught.value) == f"net: {_REFUSAL}"
    path = binary.save(tmp_path / "net.so")
    with pytest.raises(ArtifactError) as caught:
        shohin.load_binary(path)
    assert str(caught.value) == f"{path}: {_REFUSAL}"


def test_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[float]:
        raise AssertionError("measured code that cannot run here")

    monkeypatch.setattr(tuning, "measure_kernels", refuse)
    module = net(lambda s, x: s.c(x), c=nn.Conv2d(32, 64, 3))
    target = ArmTarget(tune="full")
    compiled = compile_program(captured(module, (32, 20, 20)), target, 1)
    assert max(step.macs for step in compiled.info.steps) > tuning.WORTH_MEASURING


@EMULATED
@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path) -> None:
    cpu = _CPUS[list(IMAGES).index(name) % len(_CPUS)]
    check_emulated(IMAGES[name], f"arm{{cpu={cpu}}}", tmp_path, (5, 13, 11))


@EMULATED
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, tmp_path: Path) -> None:
    cpu = _CPUS[list(ROWS).index(name) % len(_CPUS)]
    check_emulated(ROWS[name], f"arm{{cpu={cpu}}}", tmp_path, (7, 50))


@EMULATED
@pytest.mark.parametrize("cpu", _CPUS)
def test_every_core(cpu: str, tmp_path: Path) -> None:
    check_emulated(small(), f"arm{{cpu={cpu}}}", tmp_path, (3, 6, 6))


@EMULATED
def test_compressed_weights(tmp_path: Path) -> None:
    module = net(
        lambda s, x: s.c(s.b(s.a(x).relu()).relu().flatten(1)),
        a=nn.Conv2d(5, 32, 3, padding=1),
        b=nn.Conv2d(32, 24, 3, padding=1),
        c=nn.Linear(24 * 64, 10),
    )
    passes = "prune{density=0.2}, share-weights{bits=4}"
    program = shohin.optimize(captured(module, (5, 8, 8)), passes, drift=False).program
    inputs = [torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))]
    plain = run_emulated(program, "arm{cpu=cortex-a53}", inputs, tmp_path)
    sizes = [(tmp_path / "net").stat().st_size]
    coded = run_emulated(program, "arm{cpu=cortex-a53}", inputs, tmp_path, "compressed")
    sizes.append((tmp_path / "net").stat().st_size)
    assert torch.equal(coded, plain)
    assert sizes[1] < sizes[0] - 50_000


@EMULATED
@pytest.mark.parametrize("seed", range(2))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    module = RandomNet(seed).eval()
    check_emulated(
        module, f"arm{{cpu={_CPUS[seed % len(_CPUS)]}}}", tmp_path, (module.channels, 12, 12)
    )
