from pathlib import Path

import pytest
import torch
import tvm
from arm_nets import IMAGES, ROWS, small
from emulated import EMULATED, check_emulated, run_emulated
from small_nets import RandomNet, captured, compare, net
from torch import nn

import shohin
from shohin.backends.registry import parse_target
from shohin.backends.tvm import target as host
from shohin.backends.tvm.armv7 import Armv7Target
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import ConvTile
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.objects import lower
from shohin.backends.tvm.target import host_runs
from shohin.errors import ArtifactError, SpecError

_CPUS = ("generic", "cortex-a7", "cortex-a9", "cortex-a15")
EM_ARM, HARD_FLOAT = 40, 0x400


@pytest.mark.parametrize(
    ("target", "text", "resolved"),
    [
        (Armv7Target(), "armv7", "armv7-a"),
        (Armv7Target("cortex-a7"), "armv7{cpu=cortex-a7}", "armv7-a+cortex-a7"),
        (Armv7Target("cortex-a9", 2), "armv7{cpu=cortex-a9 threads=2}", "armv7-a+cortex-a9"),
    ],
)
def test_describe(target: Armv7Target, text: str, resolved: str) -> None:
    assert target.describe() == text
    assert target.resolved() == resolved
    assert parse_target(text).options == target


def test_unknown_cpu() -> None:
    with pytest.raises(SpecError) as caught:
        parse_target("armv7{cpu=cortex-a8}")
    first, *shown = str(caught.value).splitlines()
    assert first.startswith("target: unknown cpu 'cortex-a8'; did you mean 'cortex-a")
    assert shown == ["  armv7{cpu=cortex-a8}", "            ^"]


def test_threads_out_of_bounds() -> None:
    with pytest.raises(SpecError, match=r"^target armv7: expected threads from 1 to 256, got 0$"):
        Armv7Target(threads=0)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_runs("armv7-a") == "this machine is x86_64, not arm"
    monkeypatch.setattr(host, "host_machine", lambda: "arm")
    monkeypatch.setattr(host, "_host_flags", lambda: frozenset({"neon", "vfpv3"}))
    assert host_runs("armv7-a+cortex-a9") == ""
    assert host_runs("armv7-a+cortex-a7") == "this machine lacks idiva, vfpv4"
    assert host.host_example() == "armv7"


@pytest.mark.parametrize("name", ["net.so", "net.o", "net"])
def test_forms(name: str, tmp_path: Path) -> None:
    binary = shohin.compile(captured(small(), (3, 6, 6)), "armv7", batch=2)
    header = binary.save(tmp_path / name).read_bytes()[:52]
    assert int.from_bytes(header[18:20], "little") == EM_ARM
    if name != "net.o":
        assert int.from_bytes(header[36:40], "little") & HARD_FLOAT
    with pytest.raises(ArtifactError, match="was compiled for armv7-a, this machine is x86_64"):
        binary(torch.zeros(2, 3, 6, 6))


@EMULATED
@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str, tmp_path: Path) -> None:
    cpu = _CPUS[list(IMAGES).index(name) % len(_CPUS)]
    check_emulated(IMAGES[name], f"armv7{{cpu={cpu}}}", tmp_path, (5, 13, 11))


@EMULATED
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, tmp_path: Path) -> None:
    cpu = _CPUS[list(ROWS).index(name) % len(_CPUS)]
    check_emulated(ROWS[name], f"armv7{{cpu={cpu}}}", tmp_path, (7, 50))


@EMULATED
@pytest.mark.parametrize("cpu", _CPUS)
def test_every_core(cpu: str, tmp_path: Path) -> None:
    check_emulated(small(), f"armv7{{cpu={cpu}}}", tmp_path, (3, 6, 6))


@EMULATED
@pytest.mark.parametrize("seed", range(2))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    module = RandomNet(seed).eval()
    target = f"armv7{{cpu={_CPUS[seed % len(_CPUS)]}}}"
    check_emulated(module, target, tmp_path, (module.channels, 12, 12))


@EMULATED
@pytest.mark.parametrize("target", ["arm", "armv7"])
def test_pruned_and_shared_weights(target: str, tmp_path: Path) -> None:
    """By lists of non-zeros, and coded in the file: the numbers are those of x86."""
    module = net(
        lambda s, x: s.c(s.b(s.a(x).relu()).relu().flatten(1)),
        a=nn.Conv2d(5, 64, 3, padding=1),
        b=nn.Conv2d(64, 24, 3, padding=1),
        c=nn.Linear(24 * 64, 10),
    )
    passes = "prune{density=0.05}, share-weights{bits=4}"
    program = shohin.optimize(captured(module, (5, 8, 8)), passes, drift=False).program
    kernels = [step.kernel for step in shohin.compile(program, target).info.steps]
    assert any(kernel.startswith("sparse_conv2d") for kernel in kernels)
    inputs = [torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))]
    plain = run_emulated(program, target, inputs, tmp_path)
    with torch.no_grad():
        compare(plain, program.module(*inputs), tolerance=1e-5)
    size = (tmp_path / "net").stat().st_size
    assert torch.equal(run_emulated(program, target, inputs, tmp_path, "compressed"), plain)
    assert (tmp_path / "net").stat().st_size < size


@pytest.mark.parametrize("cpu", ["cortex-a7", "cortex-a15"])
def test_products_are_fused_with_sums(cpu: str) -> None:
    target = Armv7Target(cpu)
    geometry = Geometry((56, 56), (3, 3), (1, 1), (1, 1, 1, 1))
    kernel = Conv2d(1, 64, 64, geometry, 1, False, ConvTile(1, 1)).variants(target.registers())[0]
    lowered = lower({"kernel": kernel.build()}, target)
    description = tvm.target.Target(target.tvm_description())
    build = tvm.get_global_func("target.build.llvm")
    text = build(lowered, description.with_host(description)).inspect_source("asm")
    words = text.split()
    assert words.count("vfma.f32") > 0
    assert words.count("vmul.f32") == 0
    # Neither sums nor weights are spilled.
    assert "vldmia\tsp" not in text


@EMULATED
def test_pruned_convolutions_exchange_borders(tmp_path):
    """Of images that are cut in tiles of eight by eight pixels."""
    layers = {"a": nn.Conv2d(3, 16, 3, 1, 1), "b": nn.Conv2d(16, 16, 3, 1, 1)}
    module = net(lambda s, x: s.b(s.a(x).relu()).relu(), **layers)
    program = captured(module, (3, 32, 32))
    program = shohin.optimize(program, "prune{density=0.1}", drift=False).program
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = run_emulated(program, "armv7", [x], tmp_path)
    compare(found, program.module(x).detach(), tolerance=1e-5)
