import os
import subprocess
import sys
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parents[1] / "examples" / "custom_pass"
_USE = """
import torch
from torch import nn

import shohin
from shohin.passes import Context, PassManager, parse_pipeline


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.tied = nn.Linear(4, 4)

    def forward(self, x):
        y = (self.conv(x) * 0.25).flatten(1)
        return self.tied(y * 3.0) + self.tied(y) * 0.5


torch.manual_seed(0)
model, image = Scaled().eval(), torch.randn(2, 1, 3, 4)
program = shohin.capture(model, (image,))
context = Context()
passes = parse_pipeline("fold-scale{limit=100.0}, prune{density=0.5}")
result = PassManager(passes[:1]).run(program, context)
assert result.history == ("fold-scale{limit=100.0}",), result.history
torch.testing.assert_close(result.module(image), model(image), rtol=0, atol=1e-6)
print(sorted((r.outcome.value, r.reason) for r in context.remarks))
PassManager(passes).run(program, context)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the example package, installed without a network."""
    folder = tmp_path_factory.mktemp("installed")
    sources = tmp_path_factory.mktemp("sources")
    copy = _copy(sources)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(copy)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def _copy(folder: Path) -> Path:
    """The sources alone: building in place would leave files behind."""
    for source in [*_PACKAGE.glob("*.*"), *_PACKAGE.glob("src/shohin_custom_pass/*.*")]:
        target = folder / source.relative_to(_PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return folder


def _python(installed: Path, code: str) -> str:
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_pass_runs_from_pipeline_text(installed: Path) -> None:
    assert _python(installed, _USE).strip() == str(
        [("changed", "folded"), ("skipped", "not-applicable"), ("skipped", "other-users")]
    )


def test_its_options_are_checked_and_described(installed: Path) -> None:
    code = """
from shohin.errors import SpecError
from shohin.passes import describe, parse_pipeline, pass_names

assert "fold-scale" in pass_names()
(option,) = describe("fold-scale").options
print(option.name, option.type, option.default)
try:
    parse_pipeline("fold-scale{limit=0.5}")
except SpecError as error:
    print(error.problem)
"""
    lines = _python(installed, code).splitlines()
    assert lines[0] == "limit float 1000000.0"
    assert "expected 1 or more, got 0.5" in lines[1]
