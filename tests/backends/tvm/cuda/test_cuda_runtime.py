"""What a model for a GPU says when something is missing, and that it leaves nothing behind."""

import subprocess
import sys

import pytest
import torch
from emulated_gpu import start_emulated
from small_nets import captured, net
from torch import nn

import shohin
from shohin.backends.registry import describe_target
from shohin.backends.tvm.cuda import device
from shohin.backends.tvm.link import RUNTIME
from shohin.errors import ArtifactError, SpecError

NOTHING_LEFT = "allocated 0 modules 0 streams 0 contexts 0 graphs 0 events 0\n"


@pytest.fixture(scope="module")
def binary():
    torch.manual_seed(0)
    module = net(lambda s, x: s.b(s.a(x).relu()), a=nn.Linear(50, 40), b=nn.Linear(40, 3))
    return shohin.compile(captured(module, (50,)), "cuda{arch=sm_80}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("program")


X = torch.linspace(-1, 1, 50)[None]


def test_a_run_leaves_nothing_behind(binary, folder):
    log = folder / "log"
    done = start_emulated(binary, [X], folder, log=log)
    assert (done.returncode, done.stderr) == (0, "")
    assert log.read_text() == NOTHING_LEFT


def test_steps_are_timed(binary, folder):
    log = folder / "log"
    done = start_emulated(binary, [X], folder, "--profile", log=log)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0.25") >= 2
    assert log.read_text() == NOTHING_LEFT


def test_drivers_that_record_no_graphs_serve(binary, folder):
    with_graph, without = (
        start_emulated(binary, [X], folder, graphs=graphs).returncode for graphs in (1, 0)
    )
    assert with_graph == without == 0


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        ({"gpus": 0}, 4, "the CUDA driver shows no GPU"),
        (
            {"cuda": 12040},
            4,
            "the CUDA driver is too old: it knows CUDA 12.4; the model needs one for CUDA 13",
        ),
        (
            {"loads": 0},
            4,
            "the CUDA driver has no kernels for this GPU in a model compiled for sm_80; compile it "
            "for the GPU, or install a newer driver",
        ),
        ({"capability": 75}, 4, "the GPU Emulated is sm_75; the model was compiled for sm_80"),
        ({"memory": 100}, 3, "out of memory on the GPU: 9036 bytes for weights"),
        ({"memory": 9100}, 3, "out of memory on the GPU: 192 bytes for working memory"),
        ({"memory": 9300}, 3, "out of memory on the GPU: 200 bytes for inputs"),
    ],
)
def test_what_fails_is_said(binary, folder, settings, code, text):
    log = folder / "log"
    done = start_emulated(binary, [X], folder, log=log, **settings)
    assert (done.returncode, done.stderr.strip()) == (code, f"net: create: {text}")
    assert log.read_text() == NOTHING_LEFT


def test_a_machine_without_driver_is_told_so(binary, folder):
    done = start_emulated(binary, [X], folder, driver=False)
    assert done.returncode == 4
    assert done.stderr.startswith("net: create: there is no CUDA driver: libcuda.so.1")
    assert "install NVIDIA's driver for the GPU" in done.stderr


@pytest.mark.parametrize("found", ["there is no CUDA driver", 75])
def test_python_refuses_where_there_is_no_such_gpu(binary, found, monkeypatch, tmp_path):
    monkeypatch.setattr(device, "_capability", lambda: found)
    problem = found if isinstance(found, str) else "the GPU here is sm_75"
    for use in (lambda: binary(X), lambda: shohin.load_binary(binary.save(tmp_path / "net.so"))):
        with pytest.raises(ArtifactError, match=f"was compiled for sm_80, {problem}"):
            use()


def test_a_driver_that_is_too_old_is_told_so(binary, folder):
    old = folder / "old"
    old.mkdir()
    (old / "old.c").write_text("int cuInit(unsigned flags) { return (int)flags; }\n")
    target = ["-target", "x86_64-linux-gnu.2.17", "-shared"]
    command = [sys.executable, "-m", "ziglang", "cc", *target, "old.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=old, check=True)
    (folder / "input_0.npy").exists()
    done = subprocess.run(
        [folder / "program", folder / "input_0.npy"],
        capture_output=True,
        text=True,
        check=False,
        env={"LD_LIBRARY_PATH": str(old)},
    )
    assert (done.returncode, done.stderr.strip()) == (
        4,
        "net: create: the CUDA driver is too old: it lacks cuDriverGetVersion; install a newer one",
    )


def test_programs_are_linked_with_what_the_driver_needs(binary, tmp_path):
    with pytest.raises(SpecError) as caught:
        binary.save(tmp_path / "net", libc="musl")
    assert str(caught.value) == ("libc: the CUDA driver needs glibc, got 'musl'; leave it out")
    assert not list(tmp_path.iterdir())
    for name in ("net.a", "net.o", "net.h", "net.so"):
        binary.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size


@pytest.mark.parametrize("part", ["cuda", "checks", "texts"])
def test_the_runtime_compiles_without_a_warning(part, tmp_path):
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror", "-O2"]
    command = [sys.executable, "-m", "ziglang", "cc", *flags, f"-I{RUNTIME}", "-DSHOHIN_NAME=m"]
    source = RUNTIME / f"shohin_{part}.c"
    done = subprocess.run(
        [*command, "-c", source, "-o", tmp_path / "part.o"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("cuda{arch=sm_81}", "unknown arch 'sm_81'; did you mean 'sm_89'"),
        ("cuda{arch=80}", "unknown arch '80'"),
        ("cuda{host=x86}", "expected x86-64 | aarch64, got 'x86'; did you mean 'x86-64'?"),
        ("cuda{threads=2}", "unknown option 'threads'"),
        ("cude", "unknown target 'cude'"),
    ],
)
def test_targets_that_there_are_not(target, text):
    program = captured(net(lambda s, x: x.relu()), (3,))
    with pytest.raises(SpecError) as caught:
        shohin.compile(program, target)
    assert text in str(caught.value)


def test_another_processor_can_be_the_host(tmp_path):
    program = captured(net(lambda s, x: x.relu()), (3,))
    binary = shohin.compile(program, "cuda{arch=sm_87 host=aarch64}")
    saved = binary.save(tmp_path / "net.so")
    assert saved.read_bytes()[18:20] == b"\xb7\x00"  # EM_AARCH64


def test_targets_say_why_they_do_not_run_here(monkeypatch):
    monkeypatch.setattr(device, "_capability", lambda: 86)
    problems = {one.text: one.problem for one in describe_target("cuda").variants}
    assert problems["cuda"] == problems["cuda{arch=sm_86}"] == ""
    assert problems["cuda{arch=sm_90}"] == "the GPU here is sm_86"
    monkeypatch.setattr(device, "_capability", lambda: "there is no CUDA driver")
    assert {one.problem for one in describe_target("cuda").variants} == {"there is no CUDA driver"}
