import pytest

from shohin.backends.tvm import target as module
from shohin.backends.tvm.target import CpuTarget, host_runs
from shohin.errors import SpecError


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (CpuTarget(), "cpu"),
        (CpuTarget(threads=2), "cpu{threads=2}"),
        (CpuTarget("x86-64-v3"), "cpu{arch=x86-64-v3}"),
        (CpuTarget("x86-64-v4", 16), "cpu{arch=x86-64-v4 threads=16}"),
    ],
)
def test_describe(target: CpuTarget, text: str) -> None:
    assert target.describe() == text


def test_unknown_arch() -> None:
    with pytest.raises(SpecError) as caught:
        CpuTarget("x86-64-v5")
    assert str(caught.value).startswith("target cpu: unknown arch 'x86-64-v5'; did you mean ")


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_threads_out_of_bounds(threads: int) -> None:
    with pytest.raises(
        SpecError, match=f"^target cpu: expected threads from 1 to 256, got {threads}$"
    ):
        CpuTarget(threads=threads)


def test_threads_at_the_bounds() -> None:
    assert CpuTarget(threads=256).threads == 256


@pytest.mark.parametrize(
    ("arch", "registers"), [("x86-64-v2", 3), ("x86-64-v3", 7), ("x86-64-v4", 30)]
)
def test_levels(arch: str, registers: int) -> None:
    target = CpuTarget(arch)
    assert target.registers() == registers
    assert target.resolved() == arch
    assert target.tvm_description()["mcpu"] == arch


def test_native_is_a_level_that_runs_here() -> None:
    resolved = CpuTarget().resolved()
    assert resolved in ("x86-64-v2", "x86-64-v3", "x86-64-v4")
    assert host_runs(resolved) == ""
    assert CpuTarget().registers() == CpuTarget(resolved).registers()


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "_host_flags", lambda: frozenset({"ssse3", "sse4_1", "sse4_2", "avx2", "fma"})
    )
    assert host_runs("x86-64-v3") == "this machine lacks bmi2, movbe"
    assert host_runs("x86-64-v2") == ""


def test_a_machine_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_host_flags", lambda: frozenset())
    module._host_processor.cache_clear()
    try:
        with pytest.raises(SpecError, match="is not an x86-64 one"):
            CpuTarget().resolved()
    finally:
        module._host_processor.cache_clear()
