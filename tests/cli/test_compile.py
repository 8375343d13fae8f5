import subprocess

import pytest

import shohin
from shohin.backends.tvm import compile as tvm_compile


def test_shared_library_with_header(shell, program, tmp_path) -> None:
    file = tmp_path / "net.so"
    done = shell("compile", program, "--target", "cpu{threads=2}", "--batch", 3, "-o", file)
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    assert first == f"{file}: {file.stat().st_size:,} bytes, shared library for cpu{{threads=2}}"
    text = "\n".join(rest)
    assert "float32[3,1,8,8]" in text
    assert "arena" in text
    assert "compiled in" in text
    assert (tmp_path / "net.h").is_file()
    assert shohin.load_binary(file).info.batch == 3


def test_executable_as_json(shell, program, tmp_path, images) -> None:
    file = tmp_path / "net"
    found = shell("compile", program, "-o", file, "--json").json()
    assert found["path"] == str(file)
    assert found["header"] is None
    assert found["compile_seconds"] > 0
    done = subprocess.run([file, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: net")


def test_compressed_weights(shell, program, tmp_path) -> None:
    file = tmp_path / "net.so"
    done = shell("compile", program, "--weights", "compressed", "-o", file)
    assert done.code == 0, done.err
    binary = shohin.load_binary(file)
    sizes = f"{binary.info.weight_bytes:,} bytes compressed, {binary.constant_bytes:,} in memory"
    assert f"  weights      {sizes}" in done.out.splitlines()
    found = shell("inspect", file, "--json").json()
    assert (found["weights"], found["weight_bytes"]) == ("compressed", binary.info.weight_bytes)


def test_for_arm(shell, program, tmp_path) -> None:
    file = tmp_path / "net"
    done = shell("compile", program, "--target", "arm{cpu=cortex-a72}", "-o", file)
    assert done.code == 0, done.err
    first, *rest = done.out.splitlines()
    size = file.stat().st_size
    assert first == f"{file}: {size:,} bytes, executable for arm{{cpu=cortex-a72}}"
    assert any(line.startswith("  weights") for line in rest)


def test_the_form_by_an_option(shell, program, tmp_path) -> None:
    file = tmp_path / "net.armv7"
    done = shell("compile", program, "--target", "armv7", "--format", "exe", "-o", file)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].endswith("bytes, executable for armv7")
    assert file.stat().st_mode & 0o100
    file = tmp_path / "net.musl"
    done = shell("compile", program, "--format", "so", "--libc", "musl", "--json", "-o", file)
    assert done.json()["header"] == str(tmp_path / "net.h")
    done = shell("compile", program, "-o", tmp_path / "alone.h")
    assert done.out.splitlines()[0].endswith("bytes, header for cpu")


def test_model_with_passes_and_name(shell, net, tmp_path) -> None:
    file = tmp_path / "digits.o"
    options = ("--passes", "fold-bn", "--name", "digits", "--json")
    done = shell("compile", f"{net}:known", *options, "-o", file)
    assert done.json()["inputs"] == {"x": "float32[1,1,8,8]"}
    assert "digits_run" in (tmp_path / "digits.h").read_text()


@pytest.mark.parametrize(
    ("options", "code", "texts"),
    [
        (["-o", "net.txt"], 2, ["expected a name that ends in .so, .a, .o, .h or in nothing"]),
        (["-o", "/nowhere/net.so"], 7, ["there is no folder /nowhere"]),
        (["-o", "FOLDER"], 7, ["is a directory"]),
        (["--target", "gpu"], 2, ["unknown target 'gpu'", "did you mean 'cpu'?"]),
        (["--target", "cpu{thread=2}"], 2, ["unknown option 'thread'", "      ^"]),
        (["--weights", "small"], 2, ["expected 'plain' or 'compressed', got 'small'"]),
        (["--target", "cpu{threads=0}"], 2, ["threads from 1 to 256, got 0"]),
        (["--target", "cpu{threads=two}"], 2, ["expected int, got 'two'"]),
        (["--target", "cpu{arch=x86-64-v9}"], 2, ["unknown arch 'x86-64-v9'", "did you mean"]),
        (["--target", "arm{cpu=cortex-a71}"], 2, ["unknown cpu 'cortex-a71'", "'cortex-a72'"]),
        (["--target", "cpu, reference"], 2, ["expected one target"]),
        (["--target", "reference"], 7, ["the reference backend makes no machine code"]),
        (["--format", "dll"], 2, ["expected so, static, object, exe or c-header, got 'dll'"]),
        (["--libc", "bionic"], 2, ["libc: expected glibc or musl, got 'bionic'"]),
        (["--batch", "0"], 2, ["batch: expected 1 or more, got 0"]),
    ],
)
def test_wrong_options(shell, program, tmp_path, options, code, texts) -> None:
    given = [option.replace("FOLDER", str(tmp_path)) for option in options]
    output = [] if "-o" in given else ["-o", tmp_path / "net.so"]
    shell("compile", program, *output, *given).fails(code, *texts)
    assert list(tmp_path.iterdir()) == []


def test_missing_file(shell, tmp_path) -> None:
    done = shell("compile", tmp_path / "none.shohin", "-o", tmp_path / "net.so")
    done.fails(7, "there is no such file")


def test_interruption_leaves_the_old_file(shell, program, tmp_path, monkeypatch) -> None:
    file = tmp_path / "net.so"
    file.write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tvm_compile, "link", interrupt)
    done = shell("compile", program, "-o", file)
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_failing_linker_leaves_no_half_file(shell, program, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    systems = {"glibc": {"x86_64": "no-such-system"}}
    monkeypatch.setattr("shohin.backends.tvm.link._SYSTEMS", systems)
    shell("compile", program, "-o", tmp_path / "net.so").fails(7, "linker", "zig cc failed")
    assert list(tmp_path.iterdir()) == []
