import json

import torch

import shohin


def test_program(shell, program) -> None:
    done = shell("inspect", program)
    assert done.code == 0, done.err
    assert "pipeline      fold-bn" in done.out
    assert "4x1x3x3" in done.out
    assert done.out.splitlines()[-1].startswith("peak activation memory at batch 1")
    found = shell("inspect", program, "--json").json()
    assert found["totals"]["parameters"] == 1490
    assert found["file_bytes"] == program.stat().st_size
    layers = found["layers"]
    assert [layer["name"] for layer in layers] == ["conv", "fc"]
    assert sum(layer["stored_bytes"] for layer in layers) == found["totals"]["stored_bytes"]


def test_model_as_text_and_as_drawing(shell, net, tmp_path) -> None:
    file = tmp_path / "net.svg"
    done = shell("inspect", f"{net}:known", "--text", "--draw", file)
    assert done.code == 0, done.err
    assert done.out.startswith("program known [captured; functional]\n")
    assert "<svg" in file.read_text()
    found = shell("inspect", f"{net}:known", "--text", "--json").json()
    assert found["text"] == done.out.rstrip("\n")


def test_bytes_of_a_compressed_program(shell, program, tmp_path) -> None:
    text = "prune{density=0.5}, share-weights{bits=3}, entropy-code"
    small, plot = tmp_path / "small.shohin", tmp_path / "bytes.svg"
    shohin.optimize(shohin.load(program), text).save(small)
    done = shell("inspect", small, "--plot", plot)
    assert done.code == 0, done.err
    for head in ("as captured", "pruned", "shared", "in the file"):
        assert head in done.out
    assert "<svg" in plot.read_text()
    found = shell("inspect", small, "--json").json()["bytes"]
    assert found["frame"] + sum(one["stored"] for one in found["falls"]) == small.stat().st_size
    shell("inspect", "shohin.zoo:lenet5", "--plot", plot).fails(2, "only a program file has bytes")


def test_formats_of_a_fixed_point_program(shell, program, tmp_path) -> None:
    small, formats = tmp_path / "small.shohin", tmp_path / "formats.json"
    batches = [(torch.randn(4, 1, 8, 8),)]
    shohin.optimize(shohin.load(program), "fixed-point", calibration=batches).save(small)
    done = shell("inspect", small, "--formats", formats)
    assert done.code == 0, done.err
    found = json.loads(formats.read_text())
    assert [one["operator"] for one in found] == ["quantize", "convolution", "linear"]
    assert "8-bit fixed point" in done.out
    failed = shell("inspect", program, "--formats", formats)
    failed.fails(2, "has no fixed-point operators", "optimize it with --passes fixed-point")


def test_library(shell, library) -> None:
    done = shell("inspect", library)
    assert done.code == 0, done.err
    for text in ("cpu{threads=2}", "fold-bn", "float32[2,1,8,8]", "arena bytes", "content hash"):
        assert text in done.out
    found = shell("inspect", library, "--steps", "--json").json()
    assert found["file_bytes"] == library.stat().st_size
    assert found["batch"] == 2
    assert all(step["milliseconds"] >= 0 for step in found["steps"])
    assert sum(step["macs"] for step in found["steps"]) == 2 * (4 * 9 * 36 + 1440)
    assert len(found["steps"]) >= 2
    assert "Steps" in shell("inspect", library, "--steps").out


def test_executable(shell, program, tmp_path) -> None:
    shohin.compile(shohin.load(program)).save(tmp_path / "net")
    assert "target        cpu" in shell("inspect", tmp_path / "net").out
    assert shell("inspect", tmp_path / "net", "--json").json()["name"] == "net"
    (tmp_path / "other").write_text("text")
    shell("inspect", tmp_path / "other").fails(7, "expected a binary that shohin made")


def test_library_for_another_machine(shell, program, tmp_path) -> None:
    library = shohin.compile(shohin.load(program), "arm").save(tmp_path / "net.so")
    assert "target        arm" in shell("inspect", library).out
    shown = shell("inspect", library, "--steps").out
    assert "linear" in shown
    assert shown.rstrip().endswith("not timed: this machine is x86_64, not aarch64")
    steps = shell("inspect", library, "--steps", "--json").json()["steps"]
    assert {step["milliseconds"] for step in steps} == {None}


def test_library_for_a_gpu(shell, program, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("shohin.backends.tvm.cuda.device._capability", lambda: "there is no GPU")
    library = shohin.compile(shohin.load(program), "cuda{arch=sm_90}").save(tmp_path / "net.so")
    shown = shell("inspect", library, "--steps").out
    assert "target        cuda{arch=sm_90}" in shown
    assert "conv2d_float" in shown
    assert shown.rstrip().endswith("not timed: there is no GPU")


def test_forms_that_cannot_be_loaded(shell, tmp_path) -> None:
    for name in ("net.a", "net.o"):
        (tmp_path / name).write_bytes(b"!<arch>\n")
        done = shell("inspect", tmp_path / name)
        done.fails(7, "static libraries and objects cannot be loaded", "compile to .so")


def test_what_cannot_be_shown(shell, library, program, tmp_path) -> None:
    shell("inspect", library, "--text").fails(2, "neither a graph nor")
    shell("inspect", library, "--plot", "x.png").fails(2, "neither a graph nor")
    shell("inspect", program, "--steps").fails(2, "has no steps before it is compiled")
    shell("inspect", program, "--draw", "/nowhere/net.svg").fails(7, "there is no folder /nowhere")
    (tmp_path / "net.so").write_text("text")
    shell("inspect", tmp_path / "net.so").fails(7, "expected a binary that shohin made")
