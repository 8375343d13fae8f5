import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from shohin.errors import ArtifactError, PassError
from shohin.ir.program import Program, set_tensor
from shohin.ir.serialise import content_hash, load_program, read_header, save_program
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.instruments.checkpoint import Checkpoint, CheckpointWarning
from shohin.passes.instruments.drift import Drift, Error, PassDrift
from shohin.passes.manager import PassManager
from shohin.passes.remarks import Outcome, Remark

Make = Callable[..., Pass]


@pytest.fixture
def passes(shift: Make) -> list[Pass]:
    return [shift(amount=1.0), shift(amount=2.0), shift(amount=4.0)]


@pytest.fixture(autouse=True)
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def optimise(
    program: Program, passes: list[Pass], folder: Path, seed: int = 0, resume: bool = True
) -> tuple[Program, list[Remark]]:
    context = Context(seed=seed)
    result = PassManager(passes, [Checkpoint(folder, resume)]).run(program, context)
    return result, context.remarks


def test_a_second_run_runs_nothing_again(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    first, first_remarks = optimise(program, passes, tmp_path / "new")
    assert len(runs) == 3
    second, second_remarks = optimise(program, passes, tmp_path / "new")
    assert len(runs) == 3
    assert content_hash(second) == content_hash(first)
    assert second.history == ("shift{amount=1.0}", "shift{amount=2.0}", "shift{amount=4.0}")
    assert second_remarks == first_remarks
    assert len(first_remarks) == 3


def test_a_failed_run_goes_on_where_it_failed(
    program: Program, shift: Make, runs: list[str], tmp_path: Path
) -> None:
    with pytest.raises(PassError):
        optimise(program, [shift(amount=1.0), shift(amount=2.0, fail=True)], tmp_path)
    runs.clear()
    _, remarks = optimise(program, [shift(amount=1.0), shift(amount=2.0)], tmp_path)
    assert runs == ["shift 2.0 0"]
    assert [remark.detail for remark in remarks] == ["by 1.0", "by 2.0"]


def test_a_changed_option_runs_from_there(
    program: Program, shift: Make, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    optimise(program, passes, tmp_path)
    runs.clear()
    optimise(program, [passes[0], shift(amount=3.0), passes[2]], tmp_path)
    assert runs == ["shift 3.0 0", "shift 4.0 0"]
    runs.clear()
    optimise(program, [*passes, shift(amount=8.0)], tmp_path)
    assert runs == ["shift 8.0 0"]


def test_another_seed_or_weight_runs_everything(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    optimise(program, passes, tmp_path)
    optimise(program, passes, tmp_path, seed=1)
    assert len(runs) == 6
    set_tensor(program.module, "0.bias", torch.full((2,), 1e-7))
    optimise(program, passes, tmp_path)
    assert len(runs) == 9


def test_not_resuming_runs_everything_and_still_writes(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    optimise(program, passes, tmp_path, resume=False)
    optimise(program, passes, tmp_path, resume=False)
    assert len(runs) == 6
    optimise(program, passes, tmp_path)
    assert len(runs) == 6


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda _: b"", lambda _: b"foreign"])
def test_a_corrupt_checkpoint_is_reported_and_made_anew(
    program: Program,
    passes: list[Pass],
    runs: list[str],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    expected, _ = optimise(program, passes, tmp_path)
    (last,) = tmp_path.glob("03-*")
    last.write_bytes(damage(last.read_bytes()))
    runs.clear()
    with pytest.warns(CheckpointWarning, match=last.name):
        result, remarks = optimise(program, passes, tmp_path)
    assert runs == ["shift 4.0 0"]
    assert content_hash(result) == content_hash(expected)
    assert len(remarks) == 3
    optimise(program, passes, tmp_path)
    assert runs == ["shift 4.0 0"]


def test_foreign_files_are_left_alone(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    foreign = [tmp_path / "03-shift-0123.shohin", tmp_path / ".03-shift.shohin.tmp"]
    for path in foreign:
        path.write_bytes(b"half a file")
    optimise(program, passes, tmp_path)
    optimise(program, passes, tmp_path)
    assert len(runs) == 3
    assert all(path.read_bytes() == b"half a file" for path in foreign)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_restricted_pass_is_neither_saved_nor_resumed(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    optimise(program, passes, tmp_path)
    context = Context(site_filter=lambda _: True)
    PassManager([passes[2], passes[1]], [Checkpoint(tmp_path)]).run(program, context)
    PassManager(passes, [Checkpoint(tmp_path)]).run(program, context)
    assert len(runs) == 8
    assert len(list(tmp_path.iterdir())) == 3


def test_remarks_made_before_the_run_are_not_part_of_it(
    program: Program, passes: list[Pass], tmp_path: Path
) -> None:
    other = Remark("earlier", "x", "", Outcome.SKIPPED, "why")
    for _ in range(2):
        context = Context(remarks=[other])
        PassManager(passes, [Checkpoint(tmp_path)]).run(program, context)
        assert context.remarks[0] == other
        assert [remark.pass_name for remark in context.remarks[1:]] == ["shift"] * 3


@dataclass(frozen=True, kw_only=True)
class RemarkNaN(Pass):
    """Remark a figure that JSON does not know."""

    name: ClassVar[str] = "remark-nan"

    def run(self, program: Program, context: Context) -> PassResult:
        extra = {"error": float("inf")}
        remark = Remark("remark-nan", "x", "", Outcome.SKIPPED, "odd", extra=dict(extra))
        context.remarks.append(remark)
        return PassResult(program, False)


def test_remarks_may_hold_figures_that_are_not_finite(program: Program, tmp_path: Path) -> None:
    _, first = optimise(program, [RemarkNaN()], tmp_path)
    _, second = optimise(program, [RemarkNaN()], tmp_path)
    assert first == second


def test_drift_after_resuming_is_against_the_original(
    program: Program, passes: list[Pass], tmp_path: Path
) -> None:
    optimise(program, passes[:2], tmp_path)
    drift = Drift((torch.tensor([[1.0, 2.0]]),))
    PassManager(passes, [Checkpoint(tmp_path), drift]).run(program, Context())
    (last,) = drift.drifts
    assert (last.step, last.total) == (Error(4.0, 4.0 / 7), Error(7.0, 7.0 / 4))


def test_drifts_are_restored_for_the_same_sample(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    def drifts(passes: list[Pass], sample: list[list[float]]) -> tuple[PassDrift, ...]:
        drift = Drift((torch.tensor(sample),))
        instruments = [drift, Checkpoint(tmp_path, drift=drift)]
        for _ in range(2):  # An instrument can be used again.
            PassManager(passes, instruments).run(program, Context())
        return drift.drifts

    sample = [[1.0, 2.0]]
    expected = drifts(passes, sample)
    assert len(expected) == 3
    assert drifts(passes, sample) == expected
    assert drifts(passes[:2], sample) == expected[:2]
    assert len(runs) == 3
    assert drifts(passes, [[2.0, 2.0]]) == ()


def test_malformed_drifts_run_the_pass_again(
    program: Program, passes: list[Pass], runs: list[str], tmp_path: Path
) -> None:
    drift = Drift((torch.tensor([[1.0, 2.0]]),))
    checkpoint = Checkpoint(tmp_path, drift=drift)
    PassManager(passes[:1], [drift, checkpoint]).run(program, Context())
    (path,) = tmp_path.iterdir()
    extra = read_header(path).extra
    for text in ("{}", "[3]"):
        save_program(load_program(path), path, {**extra, "drifts": text})
        with pytest.warns(CheckpointWarning, match="drifts"):
            PassManager(passes[:1], [drift, checkpoint]).run(program, Context())
    assert len(runs) == 3
    assert len(drift.drifts) == 1


def test_a_folder_that_cannot_be_made_is_an_error(
    program: Program, passes: list[Pass], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be made"):
        optimise(program, passes, tmp_path / "file" / "folder")
