"""The public functions, on a small model."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.prune import Prune


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(144, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(torch.relu(self.bn(self.conv(x))).flatten(1))
        return found


@dataclass(frozen=True, kw_only=True)
class Fail(Pass):
    """A pass that is interrupted."""

    name = "fail"

    def run(self, program: shohin.Program, context: Context) -> PassResult:
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def program() -> shohin.Program:
    torch.manual_seed(0)
    return shohin.capture(Net().eval(), torch.zeros(2, 1, 8, 8))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor]:
    return (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),)


def test_every_public_name_is_there() -> None:
    assert all(getattr(shohin, name) is not None for name in shohin.__all__)
    assert set(shohin.__all__) <= set(dir(shohin))
    with pytest.raises(AttributeError, match="'shohin' has no attribute 'optimise'"):
        _ = shohin.optimise


def test_import_is_light() -> None:
    code = "import sys, shohin; print([m for m in ('torch', 'tvm', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_tvm_is_imported_on_compiling_only() -> None:
    code = "import sys, shohin; shohin.optimize; shohin.load_binary; print('tvm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_passes_as_text_and_as_objects_do_the_same(program) -> None:
    first = shohin.optimize(program, "prune{density=0.5}")
    second = shohin.optimize(program, [Prune(density=0.5)])
    mixed = shohin.optimize(program, ["fold-bn", Prune(density=0.5)])
    assert mixed.report.pipeline == "fold-bn, prune{density=0.5}"
    assert first.report.pipeline == second.report.pipeline == "prune{density=0.5}"
    assert first.program.history == second.program.history
    assert program.history == ()


def test_evaluates_before_and_after_only_when_asked(program) -> None:
    seen: list[int] = []

    def count(module: nn.Module) -> float:
        seen.append(int((module.get_parameter("fc.weight") != 0).sum()))
        return float(seen[-1])

    report = shohin.optimize(program, "prune", evaluate=count).report
    assert seen == [1440, 144]
    assert report.evaluation is not None
    assert (report.evaluation.before, report.evaluation.after) == (1440, 144)
    assert shohin.optimize(program, "prune").report.evaluation is None


def test_result_survives_a_file(program, batch, tmp_path) -> None:
    result = shohin.optimize(program, "fold-bn, prune")
    loaded = shohin.load(result.save(tmp_path / "net.shohin"))
    assert torch.equal(loaded.module(*batch), result.program.module(*batch))
    assert loaded.history == ("fold-bn", "prune")


def test_same_program_gives_the_same_file(program, tmp_path) -> None:
    files = [
        shohin.optimize(program, "fold-bn, prune").save(tmp_path / name) for name in ("a", "b")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_compiled_program_agrees_with_pytorch(program, batch, tmp_path) -> None:
    optimised = shohin.optimize(program, "fold-bn").program
    with torch.no_grad():
        wanted = optimised.module(*batch)
    for target in ("cpu", "cpu{threads=2}", "reference"):
        compiled = shohin.compile(optimised, target, batch=2)
        assert compiled.info.target == target
        torch.testing.assert_close(compiled(*batch), wanted, rtol=1e-5, atol=1e-5)
        found = compiled(batch[0].numpy())
        assert isinstance(found, np.ndarray)
    single = shohin.compile(optimised)
    assert single.info.batch == 1
    loaded = shohin.load_binary(single.save(tmp_path / "net.so"))
    joined = loaded.run_batches([batch[0].numpy()])[0]
    np.testing.assert_allclose(joined, wanted, rtol=1e-5, atol=1e-5)


class Parts(nn.Module):
    def forward(self, x: Tensor, *, mask: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        y = x * mask
        return {"a": y + 1, "b": (y * 2, torch.relu(y)), "c.d": y - 1}


def test_named_inputs_and_outputs_reach_the_binary(tmp_path) -> None:
    mask = torch.tensor([[1.0, 0.0, -1.0]])
    program = shohin.capture(Parts(), torch.ones(1, 3), kwargs={"mask": mask})
    result = shohin.optimize(program, "fold-constants, eliminate-dead")
    loaded = shohin.load(result.save(tmp_path / "net.shohin"))
    binary = shohin.compile(loaded)
    assert [spec.name for spec in binary.info.inputs] == ["x", "mask"]
    assert [spec.name for spec in binary.info.outputs] == ["a", "b_0", "b_1", "c_d"]
    found = binary.run([np.ones((1, 3), np.float32), mask.numpy()])
    np.testing.assert_allclose(found[1], 2 * mask.numpy())


def test_resume_skips_what_a_checkpoint_holds(program, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        shohin.optimize(program, [Prune(), Fail()], workdir=tmp_path)
    result = shohin.optimize(program, "prune, fold-bn", workdir=tmp_path, resume=True)
    first, second = result.report.passes
    assert (first.seconds, first.changed) == (None, 2)
    assert second.seconds is not None
    assert first.drift is not None
    assert first.drift.step.absolute > 0
    assert second.drift is not None


def test_drift_is_measured_on_noise_without_data(program, batch) -> None:
    report = shohin.optimize(program, "fold-bn, prune").report
    assert report.on_noise
    assert all(row.drift is not None for row in report.passes)
    assert report.passes[1].drift.step.relative > 0.01
    assert "on noise, as no data was given" in report.text()
    assert "on noise, as no data was given" in report.markdown()
    assert report.to_json()["drift_on_noise"]
    given = shohin.optimize(program, "prune", calibration=[batch]).report
    assert not given.on_noise
    assert "on the first calibration batch" in given.text()
    assert not shohin.optimize(program, "prune", drift=False).report.on_noise


def test_calibration_is_checked_and_can_be_read_again(program, batch) -> None:
    report = shohin.optimize(program, "fold-bn, prune", calibration=iter([batch, batch])).report
    drifts = [row.drift for row in report.passes]
    assert all(drift is not None for drift in drifts)
    assert shohin.optimize(program, "prune", calibration=[batch[0]]).report.passes[0].drift
    off = shohin.optimize(program, "prune", calibration=[batch], drift=False).report
    assert off.passes[0].drift is None


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ((torch.zeros(2, 1, 8, 8), torch.zeros(2)), r"1 tensor \(x: .*, got 2; .* without labels"),
        ((torch.zeros(2, 1, 8, 9),), r"expected float32\[N,1,8,8\], got float32\[2,1,8,9\]"),
        ((torch.zeros(2, 1, 8),), r"got float32\[2,1,8\]"),
        ((torch.zeros(2, 1, 8, 8).long(),), r"got int64\[2,1,8,8\]"),
        (([1.0],), "input 'x': expected a tensor, got list"),
        ({"x": 1}, "expected a tuple of tensors, got dict"),
    ],
)
def test_calibration_that_does_not_fit(program, item, text) -> None:
    with pytest.raises(shohin.InputError, match=f"calibration batch 0.*{text}"):
        shohin.optimize(program, "prune", calibration=[item])


def test_prints_and_dumps(program, tmp_path, capsys) -> None:
    shohin.optimize(program, "fold-bn", print_before=["fold-bn"], print_after="all", dump=tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("# before fold-bn\n")
    assert "# after fold-bn\n" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"00-captured.txt", "01-fold-bn.txt"}


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p: shohin.optimize(p.module, "prune"), "SpecError", "call shohin.capture"),
        (lambda p: shohin.compile(p.module), "SpecError", "expected a Program, got GraphModule"),
        (lambda p: shohin.optimize(p, "prun"), "SpecError", "unknown pass 'prun'"),
        (lambda p: shohin.optimize(p, 3), "SpecError", "a text or passes, got int"),
        (lambda p: shohin.optimize(p, [Prune]), "SpecError", "text or passes, got ABCMeta"),
        (lambda p: shohin.optimize(p, [Prune(density=2)]), "SpecError", "density"),
        (lambda p: shohin.optimize(p, "prune", resume=True), "SpecError", "give a workdir"),
        (lambda p: shohin.optimize(p, "prune", print_after=["pruen"]), "SpecError", "mean 'prune'"),
        (lambda p: shohin.optimize(p, "prune", calibration=3), "InputError", "got int"),
        (lambda p: shohin.optimize(p, "prune", evaluate=str.upper), "TypeError", "upper"),
        (lambda p: shohin.optimize(p, "prune", evaluate=lambda _: []), "SpecError", "got list"),
        (lambda p: shohin.compile(p, "cpu{threads=0}"), "SpecError", "threads from 1 to 256"),
        (lambda p: shohin.compile(p, "reference", batch=0), "SpecError", "1 or more, got 0"),
        (lambda p: shohin.compile(p, "cpu", batch=0), "SpecError", "1 or more, got 0"),
        (lambda p: shohin.load("none.shohin"), "ArtifactError", "there is no such file"),
        (lambda p: shohin.load_binary("none.so"), "ArtifactError", "cannot be read"),
        (lambda p: shohin.load_binary(__file__), "ArtifactError", "binary that shohin made"),
    ],
)
def test_wrong_use(program, call, error, text) -> None:
    kind = getattr(shohin, error, TypeError)
    with pytest.raises(kind) as raised:
        call(program)
    assert text in str(raised.value)
