"""The command-line program around a model."""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stub_models import (
    FLAGS,
    MODEL,
    MUSL,
    PARTS,
    ROWS,
    RUNTIME,
    define,
    example,
    expected,
    npy,
    zig,
)


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    """A static executable with one model."""
    source = folder / "net.c"
    source.write_text(MODEL)
    parts = [*PARTS, RUNTIME / "shohin_npy.c", RUNTIME / "shohin_main.c"]
    zig("cc", *FLAGS, *MUSL, *define("net"), source, *parts, "-o", folder / "net")
    return folder / "net"


Execute = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def execute(program: Path, tmp_path: Path) -> Execute:
    """Runs the program in a folder of its own."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return call


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 67), }\n"
SIZE = 4 * 4 * 67
WANTED = "expected float32[4,67] (or a multiple of 4 along axis 0), got"
CONVERT = 'convert it with numpy.save("x.npy", numpy.load("x.npy")'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a .npy file (first bytes 93 4e 55 4d 50 59), got an empty file"),
        (b"PK\x03", "expected a .npy file (first bytes 93 4e 55 4d 50 59), got 50 4b 03"),
        (b"\x93NUMPY\x01", "truncated version: expected 2 bytes, got 1"),
        (npy(GOOD, version=b"\x04\x00"), "expected .npy version 1.0, 2.0 or 3.0, got 4.0"),
        (b"\x93NUMPY\x02\x00\x01\x00", "truncated header length: expected 4 bytes, got 2"),
        (
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
            "expected a header of at most 65536 bytes, got 4294967295",
        ),
        (npy(GOOD)[:40], "truncated header: expected 61 bytes, got 30"),
        (npy(GOOD, b"\0" * 1000), f"expected {SIZE} bytes of data for float32[4,67], got 1000"),
        (npy(GOOD, b"\0" * 1076), f"expected {SIZE} bytes of data for float32[4,67], got 1076"),
        (npy("[]"), "malformed header: expected '{' at byte 0"),
        (npy("{'descr' '<f4'}"), "malformed header: expected ':' at byte 9"),
        (npy("{'descr': '<f4"), "malformed header: expected a closing quote at byte 14"),
        (npy("{'shape': (1 2)}"), "malformed header: expected ',' or ')' at byte 13"),
        (npy("{'shape': (-1,)}"), "malformed header: expected a dimension at byte 11"),
        (
            npy("{'shape': (1,), 'shape': (1,)}"),
            "malformed header: expected each key once at byte 24",
        ),
        (
            npy("{'shape': (99999999999999999999,)}"),
            "malformed header: expected a dimension below 2^63 at byte 29",
        ),
        (
            npy("{'shape': (" + "1," * 65 + ")}"),
            "malformed header: expected at most 64 dimensions at byte 139",
        ),
        (
            npy("{'descr': [('a', '<f4')], }"),
            "malformed header: expected a simple type such as '<f4' at byte 10",
        ),
        (
            npy("{'other': 1}"),
            "malformed header: expected the keys descr, fortran_order and shape only at byte 9",
        ),
        (npy(GOOD + "x"), "malformed header: expected nothing after '}' at byte 61"),
        (
            npy("{'shape': (1,)}"),
            "malformed header: expected the keys descr, fortran_order and shape at byte 15",
        ),
        (
            npy(GOOD.replace("4, 67", "4611686018427387904, 4611686018427387904")),
            "expected an array that fits in memory, got a larger shape",
        ),
        (
            npy(GOOD.replace("False", "True"), b"\0" * SIZE),
            "expected C order, got Fortran order; convert it with "
            'numpy.save("x.npy", numpy.ascontiguousarray(numpy.load("x.npy")))',
        ),
        (
            npy(GOOD.replace("<f4", "<f8"), b"\0" * 2 * SIZE),
            f'{WANTED} float64[4,67]; {CONVERT}.astype("float32"))',
        ),
        (
            npy(GOOD.replace("<f4", ">f4"), b"\0" * SIZE),
            f'{WANTED} big-endian float32[4,67]; {CONVERT}.astype("float32"))',
        ),
        (
            npy(GOOD.replace("<f4", "<U3"), b"\0" * 3 * SIZE),
            f"{WANTED} '<U3'[4,67]; {CONVERT}.astype(\"float32\"))",
        ),
        (npy(GOOD.replace("67", "66"), b"\0" * 4 * 4 * 66), f"{WANTED} float32[4,66]"),
        (npy(GOOD.replace("(4,", "(6,"), b"\0" * 4 * 6 * 67), f"{WANTED} float32[6,67]"),
        (npy(GOOD.replace("(4,", "(0,")), f"{WANTED} float32[0,67]"),
        (npy(GOOD.replace("(4, 67)", "()"), b"\0" * 4), f"{WANTED} float32[]"),
    ],
)
def test_bad_files_are_explained(
    execute: Execute, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    done = execute("x.npy")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"net: x.npy: {message}\n")


def test_program_prints_outputs(execute: Execute, tmp_path: Path) -> None:
    x = example(3)
    np.save(tmp_path / "x.npy", x)
    done = execute("--threads", "2", "x.npy")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "y float32[4,67]",
        "z float32[4,67]",
        "head/sum float32[4]",
    ]
    y, _, total = expected("net", x)
    assert lines[0].endswith(" ...")
    assert [float(word) for word in lines[0].split()[2:-1]] == y.ravel()[:8].tolist()
    assert [float(word) for word in lines[2].split()[2:]] == total.tolist()


@pytest.mark.parametrize("threads", ["1", "2", "3", "7"])
@pytest.mark.parametrize("batches", [1, 3])
def test_program_writes_outputs(
    execute: Execute, tmp_path: Path, threads: str, batches: int
) -> None:
    x = example(batches, rows=ROWS * batches)
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "out").mkdir()
    done = execute(f"--threads={threads}", "--output", "out/", "x.npy")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert execute("x.npy", "--output", "out/p").returncode == 0
    names = ["a.npy", "b.npy", "c.npy"]
    assert execute(*(f"--output=out/{name}" for name in names), "--", "x.npy").returncode == 0
    forms = [["y.npy", "z.npy", "head_sum.npy"], ["p_y.npy", "p_z.npy", "p_head_sum.npy"], names]
    for form in forms:
        for name, want in zip(form, expected("net", x), strict=True):
            np.testing.assert_array_equal(np.load(tmp_path / "out" / name), want)
    assert len(list((tmp_path / "out").iterdir())) == 9


def test_program_reports_files(execute: Execute, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", example(0))
    done = execute("missing.npy")
    assert done.returncode == 1
    assert done.stderr == "net: missing.npy: cannot open: No such file or directory\n"
    done = execute("x.npy", "--output", "missing/")
    assert done.returncode == 1
    assert done.stderr == "net: missing/y.npy: cannot write: No such file or directory\n"
    (tmp_path / "p_y.npy").mkdir()
    done = execute("x.npy", "--output", "p")
    assert done.returncode == 1
    assert done.stderr == "net: p_y.npy: cannot write: not a regular file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected 1 input file, got 0; see net --help"),
        (["a.npy", "b.npy"], "expected 1 input file, got 2; see net --help"),
        (["--fast"], "unknown option '--fast'; see net --help"),
        (["--threads"], "--threads needs a value"),
        (["--threads", "2x"], "--threads: expected a number from 0 to 256, got '2x'"),
        (["--benchmark=0"], "--benchmark: expected a number from 1 to 1000000, got '0'"),
        (["x.npy", "--output"], "--output needs a value"),
        (["x.npy", "--output", "y.npy"], "expected --output 3 times, once per output, got 1"),
        (
            ["x.npy", "--output", "y.npy", "--output", "p"],
            "--output: expected one prefix or only .npy files, got 'p'",
        ),
        (
            ["x.npy", "--output=a.npy", "--output=b.npy", "--output=a.npy"],
            "--output: two outputs would be written to 'a.npy'",
        ),
    ],
)
def test_wrong_usage(execute: Execute, arguments: list[str], message: str) -> None:
    done = execute(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"net: {message}\n")


def test_benchmark_and_profile(execute: Execute, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", example(0))
    for inputs in (["x.npy"], []):
        done = execute("--benchmark", "50", "--threads", "2", *inputs)
        assert (done.returncode, done.stderr) == (0, "")
        found = re.fullmatch(
            r"runs      50\nmedian    (\S+) ms\nminimum   (\S+) ms\nmean      (\S+) ms\n"
            r"memory    (\d+) KiB at most\n",
            done.stdout,
        )
        assert found
        median, minimum, mean, memory = map(float, found.groups())
        assert 100 < memory < 20_000
        assert 0 < minimum <= median
        assert minimum <= mean < 1000
    done = execute("--profile", "x.npy")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["step", "ms", "share", "label"]
    assert [row[3] for row in rows[1:-1]] == [
        "load",
        "check",
        "affine",
        "row_sum",
        "spread",
        "never",
        "finish",
    ]
    assert sum(float(row[2].rstrip("%")) for row in rows[1:-1]) == pytest.approx(100, abs=1)
    assert " ".join(rows[-1][3:]) == "7 steps, median of 20 runs"


def test_info_and_help(execute: Execute) -> None:
    done = execute("--info")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "model     stub",
        "target    cpu",
        "input     x float32[4,67]",
        "output    y float32[4,67]",
        "output    z float32[4,67]",
        "output    head/sum float32[4]",
        "batch     4",
        "steps     7",
        f"arena     {4 * (3 + 4 + 4 * 67)} bytes",
        "constants 8 bytes",
        "content   c0ffee",
        "version   shohin 1.2.3",
    ]
    done = execute("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: net [--threads N] ")


def test_refused_thread_is_an_internal_error(program: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 20, 16 << 20))

    np.save(tmp_path / "x.npy", example(0))
    command = [str(program), "--threads", "16", str(tmp_path / "x.npy")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr == "net: create: a thread could not be started\n"


def test_want_of_memory_at_creation_is_said(program: Path, tmp_path: Path) -> None:
    """The arena alone is larger than what the process may have."""
    source = tmp_path / "net.c"
    source.write_text(MODEL.replace("sizeof(arena)", "(size_t)1 << 32"))
    assert source.read_text() != MODEL

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    parts = [*PARTS, RUNTIME / "shohin_npy.c", RUNTIME / "shohin_main.c"]
    zig("cc", *FLAGS, *MUSL, *define("net"), source, *parts, "-o", tmp_path / "net")
    np.save(tmp_path / "x.npy", example(0))
    command = [str(tmp_path / "net"), str(tmp_path / "x.npy")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        3,
        "net: create: out of memory: 4294967296 bytes for working memory\n",
    )
