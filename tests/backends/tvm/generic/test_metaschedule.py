"""Searched schedules: right, kept, never slower, silent. Trials are few, to be quick."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import shohin
from shohin.backends.targets import read_target
from shohin.backends.tvm.generic import metaschedule
from shohin.backends.tvm.generic.region import RegionCode
from shohin.backends.tvm.generic.schedule import RangedFunction
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning import searcher as searching
from shohin.backends.tvm.tuning.schedules import Problem, ScheduleCache, Searched
from shohin.backends.tvm.tuning.searcher import Searcher
from shohin.errors import SpecError

TRIALS = 4
TARGET = CpuTarget(metaschedule=TRIALS)

FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]] = {
    "conv3d": (
        lambda x, w, b: F.conv3d(x, w, b, padding=1).relu(),
        (torch.randn(2, 4, 5, 9, 11), torch.randn(6, 4, 3, 3, 3), torch.randn(6)),
    ),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1),
        (torch.randn(1, 8, 7, 7), torch.randn(8, 12, 4, 4), torch.randn(12)),
    ),
    "contraction": (
        lambda a, b: (a[:, :, None, :] * b[None]).sum((1, 3)),
        (torch.randn(24, 20, 7), torch.randn(20, 33, 7)),
    ),
}


@pytest.fixture
def needs_search() -> None:
    pytest.importorskip("xgboost", reason="the extra 'search' is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScheduleCache:
    """An empty cache; reductions are worth searching whatever their size."""
    monkeypatch.setattr(searching, "WORTH_SEARCHING", 1000)
    return ScheduleCache(tmp_path / "schedules")


@pytest.fixture
def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searched schedules are used even when they are slower."""
    monkeypatch.setattr(Searched, "pays", property(lambda found: found.trace is not None))


def _with_search(code: RegionCode, searcher: Searcher) -> RegionCode:
    return replace(code, calls=tuple(searcher.choose(call) for call in code.calls))


def _quiet(done: int, total: int, label: str) -> None:
    """No progress wanted."""


def _pretend(monkeypatch: pytest.MonkeyPatch, trace: list[Any], milliseconds: float) -> list[int]:
    """A search that finds one trace, and measurements that give it a time; counts searches."""
    searches: list[int] = []

    def search(workload: Any, target: Processor, trials: int, *_: Any) -> list[Any]:
        searches.append(trials)
        return [metaschedule.Trial(trace, milliseconds)] if trace else []

    def measure(functions: Sequence[RangedFunction], target: Processor, **_: Any) -> list[float]:
        return [1.0, *(milliseconds for _ in functions[1:])]

    monkeypatch.setattr(metaschedule, "check_packages", lambda: None)
    monkeypatch.setattr(metaschedule, "search", search)
    monkeypatch.setattr(searching, "measure_functions", measure)
    return searches


@pytest.mark.slow
@pytest.mark.usefixtures("needs_search", "always_pays")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_search_gives_the_same_results_and_is_kept(
    name: str,
    cache: ScheduleCache,
    capture_region: Callable[..., Any],
    make_runner: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    reports: list[tuple[int, int, str]] = []
    function, inputs = FUNCTIONS[name]
    region = capture_region(function, *inputs)
    code = region.compile()
    searcher = Searcher(TARGET, cache)
    assert _with_search(code, searcher) == code
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    state = np.random.get_state()[1].tolist()
    searcher.search(lambda *report: reports.append(report))
    assert np.random.get_state()[1].tolist() == state
    assert reports == [(0, TRIALS, reports[0][2]), (TRIALS, TRIALS, "searching schedules")]
    assert capfd.readouterr() == ("", "")
    assert not list((tmp_path / "temporary").iterdir())

    searched = _with_search(code, searcher)
    assert sum("searched" in call.label for call in searched.calls) == 1
    runner = make_runner({name: searched})
    assert b"TVMBackend" not in runner.object_bytes
    for pieces in (1, 3):
        (result,) = runner.run(name, region, pieces)
        np.testing.assert_allclose(result, region.expected[0].numpy(), rtol=1e-4, atol=1e-4)

    monkeypatch.setattr(metaschedule, "search", None)
    again = Searcher(TARGET, cache)
    recalled = _with_search(region.compile(), again)
    assert not again.missing
    assert make_runner({name: recalled}).object_bytes == runner.object_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("needs_search", "always_pays")
def test_a_binary_is_the_same_from_the_cache(
    cache: ScheduleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Path.home() / ".cache" / "shohin" / "zig"
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(original))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = nn.Conv3d(4, 8, 3).eval()
    x = torch.randn(1, 4, 6, 14, 14)
    program = shohin.capture(model, x, name="net")
    target = f"cpu{{threads=2 metaschedule={TRIALS}}}"
    first = shohin.compile(program, target, batch=1)
    monkeypatch.setattr(metaschedule, "search", None)
    second = shohin.compile(program, target, batch=1)
    assert first.info.target == second.info.target == target
    assert "searched" in first.info.steps[-1].label
    files = [first.save(tmp_path / "first.so"), second.save(tmp_path / "second.so")]
    assert files[0].read_bytes() == files[1].read_bytes()
    torch.testing.assert_close(second(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("found", [True, False])
def test_our_own_kernel_stays_where_it_is_faster(
    found: bool,
    cache: ScheduleCache,
    capture_region: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, inputs = FUNCTIONS["contraction"]
    code = capture_region(function, *inputs).compile()
    # An empty list of instructions, with an empty list of decisions, leaves the loops as they are.
    searches = _pretend(monkeypatch, [[], []] if found else [], 2.0)
    searcher = Searcher(TARGET, cache)
    searcher.choose(code.calls[-1])
    searcher.search(_quiet)
    assert searcher.choose(code.calls[-1]) is code.calls[-1]
    again = Searcher(TARGET, cache)
    assert again.choose(code.calls[-1]) is code.calls[-1]
    again.search(_quiet)
    assert searches == [TRIALS]


def test_a_faster_schedule_is_used(
    cache: ScheduleCache,
    capture_region: Callable[..., Any],
    make_runner: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    region = capture_region(FUNCTIONS["contraction"][0], *FUNCTIONS["contraction"][1])
    _pretend(monkeypatch, [[], []], 0.5)
    searcher = Searcher(TARGET, cache)
    _with_search(region.compile(), searcher)
    searcher.search(_quiet)
    code = _with_search(region.compile(), searcher)
    # Nothing is parallel in the loops as they are, so they are one work item.
    assert [call.extent for call in code.calls] == [1]
    (result,) = make_runner({"net": code}).run("net", region, 2)
    np.testing.assert_allclose(result, region.expected[0].numpy(), rtol=1e-4, atol=1e-4)


def test_a_wrong_schedule_is_not_used(
    cache: ScheduleCache, capture_region: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(workload: Any, trace: Any, target: Processor) -> RangedFunction:
        return replace(original(workload, trace, target), extent=0)

    (call,) = capture_region(*_contraction()).compile().calls
    original = metaschedule.replay
    _pretend(monkeypatch, [[], []], 0.5)
    monkeypatch.setattr(metaschedule, "replay", broken)
    searcher = Searcher(TARGET, cache)
    searcher.choose(call)
    searcher.search(_quiet)
    assert searcher.choose(call) is call
    assert not searcher.missing


def test_threads_need_work_items(
    capture_region: Callable[..., Any],
) -> None:
    (call,) = capture_region(*_contraction()).compile().calls
    function = call.workload.function()
    assert metaschedule.replay(function, [[], []], TARGET).extent == 1
    with pytest.raises(ValueError, match="work items"):
        metaschedule.replay(function, [[], []], replace(TARGET, threads=2))


def _contraction() -> tuple[Any, ...]:
    function, inputs = FUNCTIONS["contraction"]
    return function, *inputs


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"trace": [], "milliseconds": "fast", "own_milliseconds": 1}',
        '{"trace": {}, "milliseconds": 0.5, "own_milliseconds": 1}',
        '{"trace": [[["Split", ["l0"], [], []]], []], "milliseconds": 0.5, "own_milliseconds": 1}',
        '{"trace": [["nonsense"], []], "milliseconds": 0.5, "own_milliseconds": 1}',
    ],
)
def test_an_unreadable_entry_counts_as_missing(
    content: str, cache: ScheduleCache, capture_region: Callable[..., Any]
) -> None:
    (call,) = capture_region(*_contraction()).compile().calls
    problem = Problem.of(call.workload.function(), TARGET)
    cache.write(problem, Searched([[], []], 0.5, 1.0))
    assert Searcher(TARGET, cache).choose(call) is not call
    (path,) = cache.folder.rglob("*.json")
    assert json.loads(path.read_text())["trials"] == TRIALS
    path.write_text(content)
    searcher = Searcher(TARGET, cache)
    assert searcher.choose(call) is call
    assert list(searcher.missing) == [problem]


def test_problems_are_kept_apart(capture_region: Callable[..., Any]) -> None:
    (call,) = capture_region(*_contraction()).compile().calls
    targets = [
        TARGET,
        replace(TARGET, metaschedule=TRIALS + 1),
        replace(TARGET, threads=2),
        replace(TARGET, arch="x86-64-v2"),
    ]
    keys = {Problem.of(call.workload.function(), target).key for target in targets}
    assert len(keys) == len(targets)


def test_equal_reductions_are_one_problem(capture_region: Callable[..., Any]) -> None:
    function, (a, b) = FUNCTIONS["contraction"]
    (alone,) = capture_region(function, a, b).compile().calls
    calls = capture_region(lambda a, b: (function(a, b), (a + 1) * 2), a, b).compile().calls
    texts = [call.workload.function().script() for call in calls if call.workload]
    assert texts == [alone.workload.function().script()]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2,
        lambda x: x.cumsum(1),
        lambda x: x.bool().any(1),
        lambda x: x.sum(),
        lambda x: x.bool().all(1),
    ],
)
def test_what_is_no_contraction_is_not_searched(
    function: Callable[..., Any], cache: ScheduleCache, capture_region: Callable[..., Any]
) -> None:
    code = capture_region(function, torch.randn(4, 24, 24)).compile()
    assert not any(call.workload for call in code.calls)


def test_small_work_and_other_processors_are_not_searched(
    tmp_path: Path, capture_region: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = capture_region(*_contraction()).compile().calls
    assert call.workload
    cache = ScheduleCache(tmp_path)
    for searcher in (Searcher(TARGET, cache), Searcher(CpuTarget(), cache)):
        assert searcher.choose(call) is call
        assert not searcher.missing
    monkeypatch.setattr(searching, "WORTH_SEARCHING", 1000)
    monkeypatch.setattr(searching, "host_runs", lambda processor: "this machine lacks avx2")
    searcher = Searcher(TARGET, cache)
    assert searcher.choose(call) is call
    assert not searcher.missing


def test_a_missing_extra_is_named(
    cache: ScheduleCache, capture_region: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metaschedule, "_PACKAGES", ("xgboost_that_nobody_has",))
    searcher = Searcher(TARGET, cache)
    searcher.search(_quiet)
    (call,) = capture_region(*_contraction()).compile().calls
    searcher.choose(call)
    with pytest.raises(SpecError) as caught:
        searcher.search(_quiet)
    assert str(caught.value) == (
        "target cpu: metaschedule needs packages that are not installed: "
        "xgboost_that_nobody_has; run pip install 'shohin[search]', or leave the option out"
    )


def test_the_option() -> None:
    target = read_target("cpu{metaschedule=64}", {"cpu": CpuTarget})
    assert target == CpuTarget(metaschedule=64)
    assert target.describe() == "cpu{metaschedule=64}"
    assert CpuTarget(threads=2, metaschedule=0).describe() == "cpu{threads=2}"
    with pytest.raises(SpecError, match="expected metaschedule from 0 to 100000 trials, got -1"):
        CpuTarget(metaschedule=-1)
    with pytest.raises(SpecError, match="expected int, got 'many'") as caught:
        read_target("cpu{metaschedule=many}", {"cpu": CpuTarget})
    assert caught.value.excerpt
