"""Many runs of small steps on several threads: nothing is lost, done twice or seen too early."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stub_models import PARTS, RUNTIME

SOURCES = [str(path) for path in (Path(__file__).with_name("stress.c"), *PARTS)]
FLAGS = ["-std=gnu11", "-DSHOHIN_NAME=stress", f"-I{RUNTIME}", "-pthread"]


def _build(compiler: list[str], program: Path) -> None:
    command = [*compiler, *FLAGS, *SOURCES, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _run(program: Path, threads: int, runs: int) -> None:
    done = subprocess.run(
        [str(program), str(threads), str(runs)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stress") / "stress"
    _build([sys.executable, "-m", "ziglang", "cc", "-O2", "-Wall", "-Wextra", "-Werror"], path)
    return path


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_equal_on_any_number_of_threads(program: Path, threads: int) -> None:
    _run(program, threads, 20_000)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and its thread sanitizer")
@pytest.mark.parametrize("threads", [2, 4])
def test_no_data_race(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "sanitized"
    try:
        _build(["gcc", "-O1", "-g", "-fsanitize=thread"], path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"gcc has no thread sanitizer here: {error.stderr.strip()[-200:]}")
    _run(path, threads, 3_000)
