"""What the C interface says when something does not fit: a status, and a text with the details."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from stub_models import (
    BUSY,
    FLAGS,
    INVALID_ARGUMENT,
    MODEL,
    MUSL,
    OK,
    PARTS,
    WRONG_SIZE,
    Model,
    define,
    example,
    new_outputs,
    pointers,
    zig,
)

from shohin.backends.tvm.arm import ArmTarget
from shohin.backends.tvm.armv7 import Armv7Target
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.target import CpuTarget

BYTES = [4 * 4 * 67, 4 * 4 * 67, 4 * 4]


def sizes(*values: int) -> ctypes.Array[ctypes.c_size_t]:
    return (ctypes.c_size_t * len(values))(*values)


@pytest.fixture
def model(library: ctypes.CDLL) -> Model:
    return Model(library, "alpha")


def test_sizes_are_compared(model: Model) -> None:
    instance = model.create(2)
    x, outputs = example(0), new_outputs()

    def run(given: int, wanted: list[int]) -> int:
        arguments = (pointers([x]), sizes(given), pointers(outputs), sizes(*wanted))
        return model.call("run_sized", instance, *arguments)

    assert run(BYTES[0], BYTES) == OK
    assert float(outputs[2][0]) == float((2 * x + 1)[0].sum())
    outputs[0][:] = -1
    assert run(BYTES[0] - 4, BYTES) == WRONG_SIZE
    assert model.last_error() == "input 'x': expected 1072 bytes, got 1068"
    assert run(BYTES[0], [BYTES[0], BYTES[1], 2**40]) == WRONG_SIZE
    assert model.last_error() == "output 'head/sum': expected 16 bytes, got 1099511627776"
    # Nothing was written.
    assert (outputs[0] == -1).all()
    model.call("destroy", instance)


def test_what_is_missing_is_named(model: Model) -> None:
    instance = model.create(1)
    x, y = example(0), new_outputs()
    inputs, outputs, hole = pointers([x]), pointers(y), pointers(y)
    hole[1] = None
    given, sized = sizes(BYTES[0]), sizes(*BYTES)
    for function, arguments, text in (
        ("create", (ctypes.c_int32(1), None), "the place for the instance is NULL"),
        ("run", (None, inputs, outputs), "the instance is NULL"),
        ("run", (instance, None, outputs), "the array of input pointers is NULL"),
        ("run", (instance, inputs, None), "the array of output pointers is NULL"),
        ("run", (instance, inputs, hole), "the pointer of output 'z' is NULL"),
        ("profile", (instance, inputs, outputs, None), "the array of milliseconds is NULL"),
        ("run_sized", (None, inputs, given, outputs, sized), "the instance is NULL"),
        (
            "run_sized",
            (instance, inputs, None, outputs, sized),
            "the input sizes are NULL",
        ),
        (
            "run_sized",
            (instance, inputs, given, outputs, None),
            "the output sizes are NULL",
        ),
        ("run_sized", (instance, inputs, given, hole, sized), "the pointer of output 'z' is NULL"),
    ):
        assert model.call(function, *arguments) == INVALID_ARGUMENT
        assert model.last_error() == text
    # What goes well does not change it.
    assert model.call("run", instance, inputs, outputs) == OK
    assert model.last_error() == text
    model.call("destroy", instance)


def test_every_thread_and_model_has_its_own(library: ctypes.CDLL, model: Model) -> None:
    assert model.call("create", ctypes.c_int32(1), None) == INVALID_ARGUMENT
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(model.last_error()))
    thread.start()
    thread.join()
    assert found == [""]
    assert Model(library, "beta").last_error() != model.last_error() or not model.last_error()


def test_statuses_have_texts(model: Model) -> None:
    texts = [model.text("status_text", status) for status in range(11)]
    assert texts[WRONG_SIZE] == "an array is not as large as the model's"
    assert texts[BUSY] == "the instance is in use by another thread"
    assert texts[8] == "there is no CUDA driver, or no GPU"
    assert texts[10] == "unknown status"
    assert len(set(texts)) == 11


def _program(folder: Path, processor: str, needs: str) -> Path:
    """A program of a model with other needs than the stub's."""
    text = MODEL.replace(
        ".steps = steps,", f'.processor = "{processor}", .needs = "{needs}", .steps = steps,'
    )
    source, name = folder / f"{processor}.c", f"needs-{processor}"
    source.write_text(text)
    others = [PARTS[0].with_name(f"shohin_{part}.c") for part in ("npy", "main")]
    zig("cc", *FLAGS, *MUSL, *define("net"), source, *PARTS, *others, "-o", folder / name)
    return folder / name


def _execute(*command: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [*command, "--benchmark", "1"], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines(True) if "TCG doesn't support" not in line]
    return done.returncode, "".join(said)


def test_a_processor_that_lacks_instructions_is_refused(tmp_path: Path) -> None:
    """Of those that this machine has, and one that no machine has."""
    assert _execute(_program(tmp_path, "x86-64", "")) == (0, "")
    program = _program(tmp_path, "future", "ssse3 sse9 sse4_1 avx1024")
    assert _execute(program) == (
        4,
        "net: create: this processor lacks sse9, avx1024; the model was compiled for future\n",
    )


@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64")
@pytest.mark.parametrize(
    ("processor", "lacking"),
    [
        ("Haswell", ""),
        ("Westmere", "avx2, bmi2, fma, movbe"),
        ("Conroe", "avx2, bmi2, fma, movbe, sse4_1, sse4_2"),
        ("Haswell,-xsave", "avx2, fma"),
    ],
)
def test_older_processors(folder: Path, processor: str, lacking: str) -> None:
    """As an emulator makes them; one of them does not save wide registers."""
    needs = " ".join(CpuTarget("x86-64-v3").needs())
    path = folder / "needs-x86-64-v3"
    program = path if path.exists() else _program(folder, "x86-64-v3", needs)
    code, said = _execute("qemu-x86_64", "-cpu", processor, program)
    text = f"net: create: this processor lacks {lacking}; the model was compiled for x86-64-v3\n"
    assert (code, said) == ((4, text) if lacking else (0, ""))


def test_every_need_is_known_to_the_runtime() -> None:
    source = PARTS[-1].read_text()
    kinds: tuple[type[Processor], ...] = (CpuTarget, ArmTarget, Armv7Target)
    needs = {need for kind in kinds for target in kind.variants() for need in target.needs()}
    assert "avx512_vnni" in needs
    assert "asimddp" in needs
    assert [need for need in sorted(needs) if f'{{"{need}", ' not in source] == []


def test_needs_agree_with_the_system(model: Model) -> None:
    """Where Linux says that an instruction set is there, the runtime finds it, and else not."""
    assert platform.machine() == "x86_64"
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].split("\n")[0].split())
    names = CpuTarget("x86-64-v4-vnni").needs()
    room = ctypes.create_string_buffer(512)
    probe = ctypes.CDLL(str(_probe(Path(model.library._name).parent)))
    probe.net_missing.restype = ctypes.c_size_t
    count = probe.net_missing(" ".join(names).encode(), room, ctypes.c_size_t(512))
    lacking = [name for name in names if name not in flags]
    assert (count, room.value.decode()) == (len(lacking), ", ".join(lacking))


def _probe(folder: Path) -> Path:
    source = folder / "probe.c"
    source.write_text(
        '#include "shohin_runtime.h"\nSHOHIN_DECLARE_RUNTIME(net);\n'
        "SHOHIN_API size_t net_missing(const char *needs, char *text, size_t room);\n"
        "size_t net_missing(const char *needs, char *text, size_t room) {\n"
        "    return net_shohin_missing(needs, text, room);\n}\n"
    )
    output = folder / "probe.so"
    zig("cc", *FLAGS, *define("net"), "-fPIC", "-shared", source, PARTS[-1], "-o", output)
    return output
