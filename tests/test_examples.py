import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import platformdirs
import pytest
import torch
from torch import nn

import shohin

_EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(*command: object, folder: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": platformdirs.user_cache_dir("shohin") + "/zig"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 36, 10)).eval()


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the compiled model in both forms of library, and an input."""
    folder = tmp_path_factory.mktemp("deploy")
    program = shohin.capture(model, torch.randn(2, 1, 8, 8), name="net")
    binary = shohin.compile(shohin.optimize(program, "fold-bn").program)
    for name in ("net.a", "net.so"):
        binary.save(folder / name)
    _image().tofile(folder / "image.f32")
    return folder


def _image() -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.random.default_rng(0).standard_normal((1, 1, 8, 8), dtype=np.float32)


@pytest.mark.parametrize(
    "library", [["net.a"], ["net.so", "-Wl,-rpath,$ORIGIN"]], ids=["static", "shared"]
)
def test_a_c_program_runs_a_compiled_model(
    model: nn.Module, folder: Path, library: list[str]
) -> None:
    zig = [sys.executable, "-m", "ziglang", "cc"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    source = _EXAMPLES / "deploy" / "main.c"
    _run(*zig, "-O2", *warnings, "-I.", source, *library, "-o", "main", "-pthread", "-lm",
         folder=folder)  # fmt: skip
    _check_said(_run("./main", "image.f32", folder=folder), model)
    (folder / "short.f32").write_bytes(b"1234")
    command = ["./main", "short.f32"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "main: short.f32: has not the size of the model's input\n"


def _expected(model: nn.Module) -> tuple[int, float]:
    with torch.inference_mode():
        scores = model(torch.from_numpy(_image()))[0]
    return int(scores.argmax()), float(scores.max())


def _check_said(said: str, model: nn.Module) -> None:
    index, score = said.split()
    expected, largest = _expected(model)
    assert int(index) == expected
    assert float(score) == pytest.approx(largest, rel=1e-4)


@pytest.mark.skipif(
    shutil.which("c++") is None,
    reason="needs a C++ compiler; that of ziglang would build its library for a minute first",
)
def test_a_cpp_program_runs_a_compiled_model(model: nn.Module, folder: Path) -> None:
    warnings = ["-std=c++11", "-Wall", "-Wextra", "-Werror"]
    source = _EXAMPLES / "deploy" / "main.cpp"
    _run(
        "c++", *warnings, "-I.", source, "net.a", "-o", "main_cpp", "-pthread", "-lm", folder=folder
    )
    _check_said(_run("./main_cpp", "image.f32", "2", folder=folder), model)
    (folder / "short.f32").write_bytes(b"12345678")
    command = ["./main_cpp", "short.f32"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "main: short.f32: input 'input_1': expected 256 bytes, got 8\n"


def test_a_python_program_needs_no_shohin(model: nn.Module, folder: Path) -> None:
    script = _EXAMPLES / "deploy" / "main.py"
    command = [sys.executable, "-I", "-S", str(script), "./net.so"]
    _check_said(_run(*command, "image.f32", folder=folder), model)
    (folder / "short.f32").write_bytes(b"12345678")
    done = subprocess.run(
        [*command, "short.f32"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "main: input 'input_1': expected 256 bytes, got 8\n"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_cmake_links_a_compiled_model(model: nn.Module, folder: Path, tmp_path: Path) -> None:
    for name in ("main.c", "main.cpp", "CMakeLists.txt"):
        shutil.copy(_EXAMPLES / "deploy" / name, tmp_path)
    for name in ("net.a", "net.h"):
        shutil.copy(folder / name, tmp_path)
    configured = subprocess.run(
        ["cmake", "-B", "build"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if configured.returncode and "COMPILER" in configured.stderr:
        pytest.skip("cmake finds no compiler")
    assert configured.returncode == 0, configured.stderr
    _run("cmake", "--build", "build", folder=tmp_path)
    for program in ("main", "main_cpp"):
        _check_said(_run(f"build/{program}", folder / "image.f32", folder=tmp_path), model)


def test_the_demo_writes_all_it_promises(tmp_path: Path) -> None:
    said = _run(sys.executable, _EXAMPLES / "demo.py", "--out", "made", folder=tmp_path)
    promised = (_EXAMPLES / "README.md").read_text()
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {name for name in made if f"`{name}`" not in promised} == set()
    assert {"net", "net.so", "net.h", "net.shohin", "report.md", "graph.svg"} <= made
    assert "test accuracy" in said
    assert shohin.load(tmp_path / "made" / "net.shohin").name == "net"
    before, after = (tmp_path / "made" / name for name in ("model.pt", "net.shohin"))
    assert after.stat().st_size < before.stat().st_size
