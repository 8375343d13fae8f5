from pathlib import Path

import pytest
import torch
from arm_nets import IMAGES, ROWS, small
from emulated import EMULATED, check_emulated, run_emulated
from small_nets import RandomNet, captured, compare, net
from torch import nn

import shohin
from shohin.backends.registry import parse_target
from shohin.backends.tvm import target as host
from shohin.backends.tvm.processor import host_flags
from shohin.backends.tvm.riscv64 import Riscv64Target
from shohin.backends.tvm.target import host_runs
from shohin.errors import ArtifactError, SpecError

EM_RISCV, COMPRESSED_AND_DOUBLES = 243, 5


def test_describe() -> None:
    for target, text in (
        (Riscv64Target(), "riscv64"),
        (Riscv64Target(2), "riscv64{threads=2}"),
    ):
        assert target.describe() == text
        assert target.resolved() == "rv64gc"
        assert parse_target(text).options == target


def test_threads_out_of_bounds() -> None:
    with pytest.raises(SpecError, match=r"^target riscv64: expected threads from 1 to 256, got 0$"):
        Riscv64Target(threads=0)


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_runs("rv64gc") == "this machine is x86_64, not riscv64"
    monkeypatch.setattr(host, "host_machine", lambda: "riscv64")
    monkeypatch.setattr(host, "_host_flags", lambda: frozenset("imafdc"))
    assert host_runs("rv64gc") == ""
    monkeypatch.setattr(host, "_host_flags", lambda: frozenset("imac"))
    assert host_runs("rv64gc") == "this machine lacks d"


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nhart\t: 1\nisa\t: rv64imafdc_zicsr_zba\nmmu\t: sv39\n", "imafdc"),
        ("isa : rv64imac\nuarch : none\n", "imac"),
        ("processor: 0\nisapoint: x\n", ""),
    ],
)
def test_letters_of_the_system(
    text: str, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    path = Path
    monkeypatch.setattr("shohin.backends.tvm.processor.Path", lambda _: path(tmp_path / "cpuinfo"))
    host_flags.cache_clear()
    assert host_flags() == frozenset(flags)
    host_flags.cache_clear()


@pytest.mark.parametrize("name", ["net.so", "net.o", "net"])
def test_forms(name: str, tmp_path: Path) -> None:
    binary = shohin.compile(captured(small(), (3, 6, 6)), "riscv64", batch=2)
    header = binary.save(tmp_path / name).read_bytes()[:64]
    assert int.from_bytes(header[18:20], "little") == EM_RISCV
    assert int.from_bytes(header[48:52], "little") == COMPRESSED_AND_DOUBLES
    with pytest.raises(ArtifactError, match="was compiled for rv64gc, this machine is x86_64"):
        binary(torch.zeros(2, 3, 6, 6))


@EMULATED
@pytest.mark.parametrize("name", ["many filters", "depthwise", "average pool"])
def test_images(name: str, tmp_path: Path) -> None:
    check_emulated(IMAGES[name], "riscv64", tmp_path, (5, 13, 11))


@EMULATED
@pytest.mark.parametrize("name", ["layer norm", "attention"])
def test_rows(name: str, tmp_path: Path) -> None:
    check_emulated(ROWS[name], "riscv64", tmp_path, (7, 50))


@EMULATED
def test_random_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = RandomNet(0).eval()
    check_emulated(module, "riscv64", tmp_path, (module.channels, 12, 12))


def run_compressed(passes: str, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network gives under the emulator after some passes, and what it should."""
    torch.manual_seed(0)
    module = net(
        lambda s, x: s.d(s.c(s.b(s.a(x).relu()).relu().flatten(1)).relu()),
        a=nn.Conv2d(5, 64, 3, padding=1),
        b=nn.Conv2d(64, 24, 3, padding=1),
        c=nn.Linear(24 * 64, 80),
        d=nn.Linear(80, 10),
    )
    x = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    program = captured(module, (5, 8, 8))
    made = shohin.optimize(program, passes, calibration=[(x,)], drift=False).program
    return run_emulated(made, "riscv64", [x], folder, "compressed"), made.module(x).detach()


@EMULATED
@pytest.mark.parametrize(
    "passes",
    [
        "prune{density=0.05}, share-weights{bits=4}, entropy-code",
        "fold-bn, low-rank{speedup=2 solver=weights}",
        "fold-bn, ternary-fit",
    ],
)
def test_compressed_weights(passes: str, tmp_path: Path) -> None:
    found, expected = run_compressed(passes, tmp_path)
    compare(found, expected, tolerance=1e-5)


@EMULATED
@pytest.mark.parametrize(
    "passes",
    [
        "fixed-point",
        "fixed-point{weights=16 data=16}",
        "fold-bn, ternary-fit, fixed-point{ternary=ratio}",
    ],
)
def test_integers_are_exact(passes: str, tmp_path: Path) -> None:
    found, expected = run_compressed(passes, tmp_path)
    assert torch.equal(found, expected)
