"""The C runtime, around hand-written stub models that stand in for generated ones."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="runs the binaries it builds, which are for x86_64 Linux",
)

RUNTIME = Path(__file__).resolve().parents[3] / "backends" / "tvm" / "runtime"
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]
FLAGS += ["-fvisibility=hidden", f"-I{RUNTIME}"]
GLIBC = ["-target", "x86_64-linux-gnu.2.17"]
MUSL = ["-target", "x86_64-linux-musl", "-static", "-s"]

ROWS, COLUMNS = 4, 67
OK, INVALID_ARGUMENT, BUSY = 0, 1, 4

# y = SCALE * x + OFFSET; z = y + the sum of y's row; sum = that sum, or NaN if the runtime passed a
# misaligned pointer. Values are small integers, so every order of summation is exact.
MODEL = r"""
#include "shohin_runtime.h"

#include <stdlib.h>

enum { ROWS = 4, COLUMNS = 67 };
typedef struct arena { float scale, offset, penalty, sums[ROWS], y[ROWS * COLUMNS]; } arena;
static const _Alignas(64) float constants[2] = {SCALE, OFFSET};

static void load(const shohin_frame *frame, int32_t begin, int32_t end) {
    arena *memory = (arena *)frame->arena;
    if (begin != 0 || end != 1) abort();
    memory->scale = ((const float *)frame->constants)[0];
    memory->offset = ((const float *)frame->constants)[1];
}

static void check(const shohin_frame *frame, int32_t begin, int32_t end) {
    (void)begin; (void)end;
    const uintptr_t all = (uintptr_t)frame->inputs[0] | (uintptr_t)frame->outputs[0]
                        | (uintptr_t)frame->outputs[1] | (uintptr_t)frame->arena;
    const int good = all % 64 == 0 && (uintptr_t)frame->outputs[2] % 16 == 0;
    ((arena *)frame->arena)->penalty = good ? 0.0f : __builtin_nanf("");
}

static void affine(const shohin_frame *frame, int32_t begin, int32_t end) {
    arena *memory = (arena *)frame->arena;
    const float *x = frame->inputs[0];
    for (int32_t i = begin; i < end; ++i) memory->y[i] = memory->scale * x[i] + memory->offset;
}

static void row_sum(const shohin_frame *frame, int32_t begin, int32_t end) {
    arena *memory = (arena *)frame->arena;
    for (int32_t row = begin; row < end; ++row) {
        memory->sums[row] = 0;
        for (int32_t i = 0; i < COLUMNS; ++i) memory->sums[row] += memory->y[row * COLUMNS + i];
    }
}

static void spread(const shohin_frame *frame, int32_t begin, int32_t end) {
    const arena *memory = (const arena *)frame->arena;
    for (int32_t i = begin; i < end; ++i) {
        ((float *)frame->outputs[0])[i] = memory->y[i];
        ((float *)frame->outputs[1])[i] = memory->y[i] + memory->sums[i / COLUMNS];
    }
}

static void finish(const shohin_frame *frame, int32_t begin, int32_t end) {
    const arena *memory = (const arena *)frame->arena;
    for (int32_t i = begin; i < end; ++i)
        ((float *)frame->outputs[2])[i] = memory->sums[i] + memory->penalty;
}

static void never(const shohin_frame *frame, int32_t begin, int32_t end) {
    (void)frame; (void)begin; (void)end;
    abort();
}

static const shohin_step steps[] = {
    {load, 1, 1, "load"}, {check, 1, 1, "check"},
    {affine, ROWS * COLUMNS, 16, "affine"}, {row_sum, ROWS, ROWS, "row_sum"},
    {spread, ROWS * COLUMNS, 16, "spread"}, {never, 0, 16, "never"}, {finish, ROWS, 1, "finish"},
};
static const int64_t matrix[] = {ROWS, COLUMNS}, vector[] = {ROWS};
static const shohin_tensor_info inputs[] = {
    {"x", SHOHIN_FLOAT32, 2, matrix, sizeof(float) * ROWS * COLUMNS}};
static const shohin_tensor_info outputs[] = {
    {"y", SHOHIN_FLOAT32, 2, matrix, sizeof(float) * ROWS * COLUMNS},
    {"z", SHOHIN_FLOAT32, 2, matrix, sizeof(float) * ROWS * COLUMNS},
    {"head/sum", SHOHIN_FLOAT32, 1, vector, sizeof(float) * ROWS}};
static const size_t input_alignment[] = {64}, output_alignment[] = {64, 64, 16};

static const shohin_model model = {
    .info = {.abi_version = SHOHIN_ABI_VERSION, .name = "stub", .metadata = "{\"key\": 1}",
             .input_count = 1, .output_count = 3, .inputs = inputs, .outputs = outputs,
             .arena_bytes = sizeof(arena), .constant_bytes = sizeof constants,
             .step_count = sizeof steps / sizeof steps[0], .batch = ROWS},
    .steps = steps, .constants = (const char *)constants,
    .input_alignment = input_alignment, .output_alignment = output_alignment};

SHOHIN_DEFINE_MODEL(SHOHIN_NAME, model);
"""

# Reports that it runs, then waits until its input becomes nonzero.
GATE = r"""
#include "shohin_runtime.h"

#include <sched.h>

static void wait_for_input(const shohin_frame *frame, int32_t begin, int32_t end) {
    (void)begin; (void)end;
    *(volatile int32_t *)frame->outputs[0] = 1;
    while (*(const volatile int32_t *)frame->inputs[0] == 0) sched_yield();
}

static const shohin_step steps[] = {{wait_for_input, 1, 1, "wait"}};
static const shohin_tensor_info tensors[] = {{"gate", SHOHIN_INT32, 0, NULL, 4}};
static const size_t alignment[] = {4};
static const shohin_model model = {
    .info = {.abi_version = SHOHIN_ABI_VERSION, .name = "gate", .metadata = "{}",
             .input_count = 1, .output_count = 1, .inputs = tensors, .outputs = tensors,
             .step_count = 1},
    .steps = steps, .input_alignment = alignment, .output_alignment = alignment};

SHOHIN_DEFINE_MODEL(gate, model);
"""

# Reads a .npy file of any type and shape and writes it again.
COPY = r"""
#include "shohin_npy.h"

#include <stdlib.h>

int main(int count, char **arguments) {
    shohin_npy file;
    shohin_npy_error error;
    if (count != 3) return 2;
    if (!shohin_npy_open(arguments[1], &file, &error)) return puts(error.text), 1;
    if (!file.supported) return puts(file.dtype_name), 1;
    void *data = malloc(file.bytes + 1);
    if (!shohin_npy_read(&file, data, &error)) return puts(error.text), 1;
    shohin_npy_close(&file);
    if (!shohin_npy_write(arguments[2], file.dtype, file.rank, file.shape, data, &error))
        return puts(error.text), 1;
    free(data);
    return 0;
}
"""


class TensorInfo(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("bytes", ctypes.c_size_t),
    )


class Info(ctypes.Structure):
    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("inputs", ctypes.POINTER(TensorInfo)),
        ("outputs", ctypes.POINTER(TensorInfo)),
        ("arena_bytes", ctypes.c_size_t),
        ("constant_bytes", ctypes.c_size_t),
        ("step_count", ctypes.c_int32),
        ("batch", ctypes.c_int32),
    )


def zig(*arguments: str | Path) -> None:
    """Runs the compiler; a warning is a failure."""
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def pointers(arrays: Sequence[np.ndarray[Any, Any]]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def place(shape: Sequence[int], offset: int) -> np.ndarray[Any, Any]:
    """A float32 array that lies `offset` bytes behind a 64-byte boundary, with NaN around it."""
    size = int(np.prod(shape))
    memory = np.full(size + 64, np.nan, np.float32).view(np.uint8)
    start = (-memory.ctypes.data) % 64 + offset
    return memory[start : start + 4 * size].view(np.float32).reshape(shape)


@dataclass
class Model:
    """The functions of one model in a loaded library."""

    library: ctypes.CDLL
    name: str

    def call(self, function: str, *arguments: object) -> int:
        status: int = getattr(self.library, f"{self.name}_{function}")(*arguments)
        return status

    def info(self) -> Info:
        function = getattr(self.library, f"{self.name}_info")
        function.restype = ctypes.POINTER(Info)
        contents: Info = function().contents
        return contents

    def text(self, function: str, argument: int) -> str | None:
        call = getattr(self.library, f"{self.name}_{function}")
        call.restype = ctypes.c_char_p
        result: bytes | None = call(ctypes.c_int32(argument))
        return None if result is None else result.decode()

    def create(self, threads: int) -> ctypes.c_void_p:
        instance = ctypes.c_void_p()
        assert self.call("create", ctypes.c_int32(threads), ctypes.byref(instance)) == OK
        assert instance.value
        return instance


SCALES = {"alpha": (2.0, 1.0), "beta": (-3.0, 4.0), "net": (2.0, 1.0)}


def expected(name: str, x: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    scale, offset = SCALES[name]
    y = (scale * x + offset).astype(np.float32)
    total = y.sum(axis=1, dtype=np.float32)
    return [y, y + total[:, None], total]


def example(seed: int, rows: int = ROWS) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(-9, 9, (rows, COLUMNS)).astype(np.float32)


def new_outputs(offset: int = 0) -> list[np.ndarray[Any, Any]]:
    return [place((ROWS, COLUMNS), offset), place((ROWS, COLUMNS), offset), place((ROWS,), offset)]


def run_once(model: Model, instance: ctypes.c_void_p, x: np.ndarray[Any, Any]) -> bool:
    """Whether one run gives the right numbers."""
    outputs = new_outputs()
    assert model.call("run", instance, pointers([x]), pointers(outputs)) == OK
    return all(map(np.array_equal, outputs, expected(model.name, x)))


def define(name: str) -> list[str]:
    scale, offset = SCALES.get(name, (0, 0))
    return [f"-DSHOHIN_NAME={name}", f"-DSCALE={scale}f", f"-DOFFSET={offset}f"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtime")


@pytest.fixture(scope="module")
def library(folder: Path) -> ctypes.CDLL:
    """Three models in one shared library."""
    objects: list[Path] = []
    for name, text in (("alpha", MODEL), ("beta", MODEL), ("gate", GATE)):
        source = folder / f"{name}.c"
        source.write_text(text)
        for number, part in enumerate((source, RUNTIME / "shohin_runtime.c")):
            objects.append(folder / f"{name}{number}.o")
            zig("cc", *GLIBC, *FLAGS, *define(name), "-fPIC", "-c", part, "-o", objects[-1])
    zig("cc", *GLIBC, "-shared", "-pthread", *objects, "-o", folder / "models.so")
    return ctypes.CDLL(str(folder / "models.so"))


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    """A static executable with one model."""
    source = folder / "net.c"
    source.write_text(MODEL)
    parts = [RUNTIME / f"shohin_{part}.c" for part in ("runtime", "npy", "main")]
    zig("cc", *MUSL, *FLAGS, *define("net"), source, *parts, "-o", folder / "net")
    return folder / "net"


@pytest.fixture(scope="module")
def copier(folder: Path) -> Path:
    source = folder / "copy.c"
    source.write_text(COPY)
    zig("cc", *MUSL, *FLAGS, source, RUNTIME / "shohin_npy.c", "-o", folder / "copy")
    return folder / "copy"


Execute = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def execute(program: Path, tmp_path: Path) -> Execute:
    """Runs the program in a folder of its own."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return call


# ---------------------------------------------------------------- the library


@pytest.mark.parametrize("name", ["alpha", "beta"])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_result_does_not_depend_on_threads(library: ctypes.CDLL, name: str, threads: int) -> None:
    model = Model(library, name)
    instance = model.create(threads)
    assert all(run_once(model, instance, example(seed)) for seed in range(200))
    model.call("destroy", instance)


def test_thread_count_is_limited_and_defaults_to_all(library: ctypes.CDLL) -> None:
    model = Model(library, "alpha")
    for threads in (-1, 0, 100_000):
        before = len(os.listdir("/proc/self/task"))
        instance = model.create(threads)
        started = len(os.listdir("/proc/self/task")) - before
        # No step has more than 16 parts.
        wanted = 16 if threads > 0 else min(16, len(os.sched_getaffinity(0)))
        assert started == wanted - 1
        assert run_once(model, instance, example(0))
        model.call("destroy", instance)


def test_unsplit_model_starts_no_thread(library: ctypes.CDLL) -> None:
    before = len(os.listdir("/proc/self/task"))
    model = Model(library, "gate")
    instance = model.create(8)
    assert len(os.listdir("/proc/self/task")) <= before
    model.call("destroy", instance)


def test_info_describes_the_model(library: ctypes.CDLL) -> None:
    model = Model(library, "beta")
    info = model.info()
    assert (info.abi_version, info.name, info.batch, info.step_count) == (1, b"stub", ROWS, 7)
    assert json.loads(info.metadata) == {"key": 1}
    assert [info.outputs[i].name for i in range(info.output_count)] == [b"y", b"z", b"head/sum"]
    tensor = info.inputs[0]
    assert (tensor.dtype, tensor.shape[: tensor.rank], tensor.bytes) == (0, [4, 67], 4 * 4 * 67)
    assert [model.text("step_label", i) for i in (-1, 0, 6, 7)] == [None, "load", "finish", None]
    assert model.text("status_text", BUSY) == "the instance is in use by another thread"
    assert model.text("status_text", 99) == "unknown status"


def test_only_the_public_functions_are_exported(library: ctypes.CDLL) -> None:
    assert hasattr(library, "alpha_run")
    assert not hasattr(library, "alpha_shohin_run")
    assert not hasattr(library, "model")


@pytest.mark.parametrize("offset", [4, 1, 32])
@pytest.mark.parametrize("threads", [1, 2])
def test_misaligned_pointers_are_staged(library: ctypes.CDLL, offset: int, threads: int) -> None:
    model = Model(library, "alpha")
    instance = model.create(threads)
    for seed in range(3):
        x = place((ROWS, COLUMNS), offset)
        x[:] = example(seed)
        outputs = new_outputs(offset)
        assert model.call("run", instance, pointers([x]), pointers(outputs)) == OK
        for got, want in zip(outputs, expected("alpha", x), strict=True):
            np.testing.assert_array_equal(got, want)
    assert run_once(model, instance, example(5))
    model.call("destroy", instance)


def test_null_pointers_are_refused(library: ctypes.CDLL) -> None:
    model = Model(library, "alpha")
    instance = model.create(2)
    inputs, outputs = pointers([example(0)]), pointers(new_outputs())
    hole = pointers(new_outputs())
    hole[1] = None
    assert model.call("create", ctypes.c_int32(1), None) == INVALID_ARGUMENT
    assert model.call("run", None, inputs, outputs) == INVALID_ARGUMENT
    assert model.call("run", instance, None, outputs) == INVALID_ARGUMENT
    assert model.call("run", instance, inputs, None) == INVALID_ARGUMENT
    assert model.call("run", instance, (ctypes.c_void_p * 1)(), outputs) == INVALID_ARGUMENT
    assert model.call("run", instance, inputs, hole) == INVALID_ARGUMENT
    assert model.call("profile", instance, inputs, outputs, None) == INVALID_ARGUMENT
    assert run_once(model, instance, example(0))
    model.call("destroy", instance)
    model.call("destroy", None)


def test_profile_times_every_step(library: ctypes.CDLL) -> None:
    model = Model(library, "alpha")
    instance = model.create(2)
    x, outputs = place((ROWS, COLUMNS), 0), new_outputs()
    x[:] = example(1)
    times = (ctypes.c_double * 7)(*[-1.0] * 7)
    assert model.call("profile", instance, pointers([x]), pointers(outputs), times) == OK
    assert all(0 <= time < 1000 for time in times)
    np.testing.assert_array_equal(outputs[1], expected("alpha", x)[1])
    model.call("destroy", instance)


def test_instances_run_concurrently(library: ctypes.CDLL) -> None:
    right: list[bool] = []

    def work(name: str, seed: int) -> None:
        model = Model(library, name)
        instance = model.create(2)
        right.append(all(run_once(model, instance, example(seed + i)) for i in range(1500)))
        model.call("destroy", instance)

    threads = [
        threading.Thread(target=work, args=(name, seed))
        for seed, name in enumerate(["alpha", "alpha", "beta"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True, True, True]


def test_instances_come_and_go(library: ctypes.CDLL) -> None:
    model = Model(library, "beta")
    before = len(os.listdir("/proc/self/task"))
    for turn in range(100):
        instance = model.create(4)
        assert turn % 2 or run_once(model, instance, example(turn))
        model.call("destroy", instance)
    # An unrelated thread of the process may have ended in between.
    assert len(os.listdir("/proc/self/task")) <= before


def test_concurrent_run_of_one_instance_is_busy(library: ctypes.CDLL) -> None:
    model = Model(library, "gate")
    instance = model.create(1)
    gate, started = np.zeros(1, np.int32), np.zeros(1, np.int32)
    first: list[int] = []
    arguments = (instance, pointers([gate]), pointers([started]))
    thread = threading.Thread(target=lambda: first.append(model.call("run", *arguments)))
    thread.start()
    while not started[0]:
        time.sleep(0.001)
    assert model.call("run", *arguments) == BUSY
    assert model.call("profile", *arguments, (ctypes.c_double * 1)()) == BUSY
    gate[0] = 1
    thread.join()
    assert first == [OK]
    assert model.call("run", *arguments) == OK
    model.call("destroy", instance)


def test_idle_workers_use_no_processor_time(library: ctypes.CDLL) -> None:
    model = Model(library, "alpha")
    instance = model.create(2)
    assert run_once(model, instance, example(0))
    before = time.process_time()
    time.sleep(0.4)
    assert time.process_time() - before < 0.1
    # Sleeping workers wake up again.
    for seed in range(20):
        time.sleep(0.002)
        assert run_once(model, instance, example(seed))
    model.call("destroy", instance)


# ---------------------------------------------------------------- other compilers and targets


def test_header_is_valid_cpp(folder: Path) -> None:
    source = folder / "user.cpp"
    source.write_text(
        '#include "shohin.h"\n#define NAME net\nSHOHIN_DECLARE_MODEL(NAME);\n'
        "const shohin_info *use() { return net_info(); }\n"
    )
    flags = ["-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{RUNTIME}"]
    # `cc` rather than `c++`, and no C++ headers: the C++ library need not be built for this.
    zig("cc", *GLIBC, "-nostdinc++", *flags, "-c", source, "-o", folder / "user.o")


def test_compiles_for_arm(folder: Path) -> None:
    for part in ("runtime", "npy", "main"):
        source = RUNTIME / f"shohin_{part}.c"
        target = ["-target", "aarch64-linux-gnu.2.17"]
        zig("cc", *target, *FLAGS, *define("net"), "-c", source, "-o", folder / "arm.o")


# ---------------------------------------------------------------- .npy files

DTYPES = ["float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy_round_trip(copier: Path, tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(), (5,), (2, 3, 4), (0, 3), (1,) * 20]
    for version, shape in [*((1, shape) for shape in shapes), (2, (3, 2)), (3, (3, 2))]:
        array = np.asarray(
            rng.integers(0, 2, shape) if dtype == "bool" else rng.normal(0, 50, shape)
        )
        array = array.astype(np.int64).astype(dtype)
        with (tmp_path / "in.npy").open("wb") as stream:
            np.lib.format.write_array(stream, array, version=(version, 0))
        done = subprocess.run(
            [copier, "in.npy", "out.npy"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "")
        got = np.load(tmp_path / "out.npy")
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got, array)
        written = (tmp_path / "out.npy").read_bytes()
        assert written.endswith(b"\n" + array.tobytes())
        assert (len(written) - array.nbytes) % 64 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.npy"]


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A file with any header."""
    width = 2 if version[0] == 1 else 4
    return b"\x93NUMPY" + version + len(header).to_bytes(width, "little") + header.encode() + data


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


def test_every_cut_of_a_file_is_refused(copier: Path, tmp_path: Path) -> None:
    whole = npy("{'descr': '|i1', 'fortran_order': False, 'shape': (3,), }\n", b"abc")
    for length in range(len(whole)):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        done = subprocess.run(
            [copier, tmp_path / "x.npy", tmp_path / "y.npy"], stdout=-3, check=False
        )
        assert done.returncode == 1
    assert not (tmp_path / "y.npy").exists()


# ---------------------------------------------------------------- the executable


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
            r"runs      50\nmedian    (\S+) ms\nminimum   (\S+) ms\nmean      (\S+) ms\n",
            done.stdout,
        )
        assert found
        median, minimum, mean = map(float, found.groups())
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
        "input     x float32[4,67]",
        "output    y float32[4,67]",
        "output    z float32[4,67]",
        "output    head/sum float32[4]",
        "batch     4",
        "steps     7",
        f"arena     {4 * (3 + 4 + 4 * 67)} bytes",
        "constants 8 bytes",
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
