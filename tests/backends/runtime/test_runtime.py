"""The C runtime, around hand-written models that stand in for generated ones."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from stub_models import (
    BUSY,
    COLUMNS,
    FLAGS,
    GLIBC,
    INVALID_ARGUMENT,
    OK,
    ROWS,
    RUNTIME,
    Model,
    define,
    example,
    expected,
    new_outputs,
    place,
    pointers,
    run_once,
    zig,
)


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
    assert (info.abi_version, info.name, info.batch, info.step_count) == (2, b"stub", ROWS, 7)
    assert (info.version, info.target, info.content_hash) == (b"1.2.3", b"cpu", b"c0ffee")
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
