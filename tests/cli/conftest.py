"""A small model in a file, the same as a program and as a library, and the command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import shohin
from shohin.cli.app import app
from shohin.cli.names import load_object

MODEL = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(144, 10)

    def forward(self, x):
        return self.fc(self.relu(self.bn(self.conv(x))).flatten(1))


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def model():
    torch.manual_seed(0)
    return Net().eval()


def known():
    return model()


known.example_inputs = lambda: (torch.zeros(2, 1, 8, 8),)
branch = Branch()
number = 3


def nan_model():
    net = model()
    with torch.no_grad():
        net.fc.weight[0, 0] = float("nan")
    return net


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield (torch.randn(4, 1, 8, 8, generator=generator),)


def labelled():
    return [(torch.zeros(4, 1, 8, 8), torch.zeros(4))]


def accuracy(module):
    return 0.75


def kept(module):
    weights = [p for name, p in module.named_parameters() if name in ("conv.weight", "fc.weight")]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def nothing(module):
    return None


def broken():
    return 1 / 0
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    def fails(self, code: int, *texts: str) -> None:
        """Check an error: its exit code, texts in it, no traceback, nothing on stdout."""
        assert self.code == code, self.err
        assert self.err.startswith("error: "), self.err
        assert "Traceback" not in self.err
        assert len(self.err.splitlines()) < 25
        assert self.out == ""
        for text in texts:
            assert text in self.err


Shohin = Callable[..., Outcome]


@pytest.fixture(scope="session")
def shell() -> Shohin:
    """Run the command line in this process."""

    def run(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def process() -> Shohin:
    """Run the command line in a process of its own."""

    def run(*arguments: object) -> Outcome:
        command = [sys.executable, "-m", "shohin", *(str(argument) for argument in arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model's file, ``net.py``."""
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(MODEL)
    return path


@pytest.fixture(scope="session")
def net(folder: Path) -> str:
    """The model's file."""
    return str(folder / "net.py")


@pytest.fixture(scope="session")
def program(folder: Path, net: str) -> Path:
    """The model with its batch norm folded, in a ``.shohin`` file."""
    import torch

    build = load_object(f"{net}:model", "MODEL")
    assert callable(build)
    captured = shohin.capture(build(), (torch.zeros(2, 1, 8, 8),), name="net")
    path = folder / "net.shohin"
    shohin.optimize(captured, "fold-bn").save(path)
    return path


@pytest.fixture(scope="session")
def library(folder: Path, program: Path) -> Path:
    """The program compiled for a batch of 2, in a ``.so`` file."""
    path = folder / "net.so"
    artifact = shohin.compile(shohin.load(program), "cpu{threads=2}", batch=2)
    artifact.save(path)
    return path


@pytest.fixture(scope="session")
def images(folder: Path) -> Path:
    """Six inputs of the model in a ``.npy`` file."""
    path = folder / "x.npy"
    np.save(path, np.random.default_rng(0).standard_normal((6, 1, 8, 8)).astype(np.float32))
    return path
