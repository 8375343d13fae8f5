"""The command line as its own process: what only a real one shows."""

import sys

import pytest

import shohin

COMMANDS = ("optimize", "compile", "run", "inspect", "bench", "sensitivity", "passes", "bisect")


def test_version(process) -> None:
    done = process("--version")
    assert (done.code, done.out) == (0, f"shohin {shohin.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(shell, command) -> None:
    done = shell(command, "--help")
    assert done.code == 0
    assert "Examples:" in done.out
    assert f"shohin {command}" in done.out


def test_help_lists_every_command(shell) -> None:
    done = shell("--help")
    assert all(command in done.out for command in COMMANDS)
    assert "Exit codes: 0 success;" in done.out
    words = " ".join(shell("bisect", "--help").out.split())
    assert "The exit code is 1 when a pass is found" in words


@pytest.mark.parametrize("arguments", [["unknown"], ["optimize"], ["passes", "--unknown"]])
def test_wrong_usage(shell, arguments) -> None:
    done = shell(*arguments)
    assert done.code == 2
    assert "Usage: " in done.err


def test_error_and_debug(process, net) -> None:
    command = ("optimize", f"{net}:number", "--passes", "fold-bn")
    process(*command).fails(2, "expected a function without arguments")
    done = process("--debug", *command)
    assert done.code == 1
    assert "Traceback" in done.err


def test_interruption(process, tmp_path) -> None:
    # A process started in the background may ignore interrupts from birth.
    text = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def model():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
    )
    (tmp_path / "stop.py").write_text(text)
    done = process("optimize", f"{tmp_path}/stop.py:model", "--passes", "fold-bn")
    assert (done.code, done.out, done.err) == (130, "", "interrupted\n")


def test_light_imports(process) -> None:
    import subprocess

    code = "import sys, shohin, shohin.cli; print('torch' in sys.modules, 'tvm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr
