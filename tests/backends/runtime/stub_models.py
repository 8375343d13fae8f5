"""Hand-written models around the C runtime, which stand in for generated ones."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RUNTIME = Path(__file__).resolve().parents[3] / "backends" / "tvm" / "runtime"
FLAGS = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]
FLAGS += ["-fvisibility=hidden", f"-I{RUNTIME}"]
GLIBC = ["-target", "x86_64-linux-gnu.2.17"]
MUSL = ["-target", "x86_64-linux-musl", "-static", "-s"]
# By these flags the C library is that of executables: no other has to be built.
MUSL += ["-Os", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables"]
ROWS, COLUMNS = 4, 67
OK, INVALID_ARGUMENT, BUSY, WRONG_SIZE, UNSUPPORTED_PROCESSOR = 0, 1, 4, 6, 7

PARTS = [RUNTIME / f"shohin_{part}.c" for part in ("runtime", "texts", "checks", "processor")]
"""The runtime, without what only some models need."""


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
    .info = {.abi_version = SHOHIN_ABI_VERSION, .name = "stub", .version = "1.2.3",
             .target = "cpu", .content_hash = "c0ffee", .metadata = "{\"key\": 1}",
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
    .info = {.abi_version = SHOHIN_ABI_VERSION, .name = "gate", .version = "1.2.3",
             .target = "cpu", .content_hash = "", .metadata = "{}",
             .input_count = 1, .output_count = 1, .inputs = tensors, .outputs = tensors,
             .step_count = 1},
    .steps = steps, .input_alignment = alignment, .output_alignment = alignment};

SHOHIN_DEFINE_MODEL(gate, model);
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
        ("version", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
        ("content_hash", ctypes.c_char_p),
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

    def last_error(self) -> str:
        call = getattr(self.library, f"{self.name}_last_error")
        call.restype = ctypes.c_char_p
        found: bytes = call()
        return found.decode()

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


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """A file with any header."""
    width = 2 if version[0] == 1 else 4
    return b"\x93NUMPY" + version + len(header).to_bytes(width, "little") + header.encode() + data
