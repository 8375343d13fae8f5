import ctypes
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from typer.testing import CliRunner

import shohin
from shohin.cli.app import app

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "README.md").read_text()


def _block(language: str) -> str:
    """The only block of a language."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", _README, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the Python block has run."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "block.py").write_text(_block("python"))
    command = [sys.executable, "block.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prune{density=0.3}" in done.stdout
    return folder


def test_the_python_block_runs_and_gives_a_right_binary(folder: Path) -> None:
    program, binary = shohin.load(folder / "net.shohin"), shohin.load_binary(folder / "net.so")
    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(binary(image), program.module(image), rtol=1e-4, atol=1e-5)


def test_the_block_is_as_short_as_promised() -> None:
    statements = _block("python").partition("program = ")[2].splitlines()
    assert len(statements) <= 10


def test_the_c_block_compiles_and_runs(folder: Path) -> None:
    shohin.compile(shohin.load(folder / "net.shohin"), "cpu{threads=2}").save(folder / "net.a")
    (folder / "caller.c").write_text(_block("c"))
    (line,) = (line for line in _README.splitlines() if "ziglang cc" in line)
    command = line.partition("#")[0].split()
    zig = str(Path(platformdirs.user_cache_dir("shohin")) / "zig")
    done = subprocess.run(
        [sys.executable, *command[1:]],
        cwd=folder,
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert subprocess.run(["./caller"], cwd=folder, check=False).returncode == 0


def test_the_tour_of_the_command_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", np.zeros((1, 3, 32, 32), np.float32))
    lines = re.findall(r"^    shohin (.*)$", _README, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line, comments=True)
        words += ["--budget", "0.1"] if words[0] == "bench" else []
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"shohin {line}\n{done.output}"
    assert np.load("scores.npy").shape == (1, 10)


def test_the_header_offers_what_the_library_exports(folder: Path) -> None:
    library = ctypes.CDLL(str(folder / "net.so"))
    declared = re.findall(r"NAME##_(\w+)\(", (folder / "net.h").read_text())
    assert {"info", "create", "run", "destroy"} <= set(declared)
    assert [name for name in declared if not hasattr(library, f"net_{name}")] == []


def test_the_readme_names_the_targets_of_the_makefile() -> None:
    named = set(re.findall(r"\bmake (\w+)", _README))
    targets = set(re.findall(r"^(\w+):", (_ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets
