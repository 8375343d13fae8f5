"""Running what is compiled for a GPU on the processor: see `emulator.c`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from shohin.backends.tvm.cuda.compile import SOURCE_FILE

HERE = Path(__file__).parent
_FUNCTION = re.compile(
    r'extern "C" __global__ void __launch_bounds__\(\d+\) (?P<name>\w+)\((?P<parameters>[^)]*)\) \{'
)


def build_driver(source, folder):
    """Compile kernels for the processor, and link them with the emulator."""
    calls, rows = [], []
    for found in _FUNCTION.finditer(source):
        types = [part.rpartition("__restrict__")[0] for part in found["parameters"].split(",")]
        types = [kind.strip() for kind in types if kind.strip()]
        values = ", ".join(f"*({kind} *)arguments[{i}]" for i, kind in enumerate(types))
        name = found["name"]
        calls.append(f"static void run_{name}(void **arguments) {{ {name}({values}); }}\n")
        rows.append(f'    {{"{name}", run_{name}, {len(types)}}},\n')
    table = (
        "struct emulated_kernel { const char *name; void (*run)(void **); int arguments; };\n"
        'extern "C" const emulated_kernel emulated_kernels[] = {\n'
        + "".join(rows)
        + "    {nullptr, nullptr, 0}};\n"
    )
    text = f'#include "{HERE / "emulator.hpp"}"\n{source}\n{"".join(calls)}{table}'
    (folder / "kernels.cpp").write_text(text)
    flags = ["-O1", "-fPIC", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-w"]
    # What is undefined would stop the program: kernels are to be free of it.
    flags += ["-fno-strict-aliasing"]
    _zig("c++", *flags, "-std=c++17", "-c", folder / "kernels.cpp", "-o", folder / "kernels.o")
    _zig("cc", "-O1", "-fPIC", "-std=gnu11", "-c", HERE / "emulator.c", "-o", folder / "driver.o")
    objects = [folder / "kernels.o", folder / "driver.o"]
    _zig("cc", "-shared", *objects, "-lm", "-o", folder / "libcuda.so.1")


def _zig(*arguments):
    target = ["-target", "x86_64-linux-gnu.2.17"]
    command = [sys.executable, "-m", "ziglang", str(arguments[0]), *target]
    done = subprocess.run(
        [*command, *map(str, arguments[1:])], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[:3000]


def run_emulated(binary, inputs, folder, **settings):
    """The outputs of a binary on an emulated GPU, in order."""
    done = start_emulated(binary, inputs, folder, **settings)
    assert done.returncode == 0, done.stderr
    names = [f"output_{index}.npy" for index in range(len(binary.info.outputs))]
    return [torch.from_numpy(np.load(folder / name)) for name in names]


def start_emulated(binary, inputs, folder, *options, driver=True, **settings):
    """Run a binary's program with arrays as files; how it ended.

    Args:
        binary: for a GPU.
        inputs: what goes in.
        folder: where files are written; the program of a binary is linked once.
        options: of the program.
        driver: whether it finds the emulated driver.
        settings: of the emulator, without their prefix.
    """
    if not (folder / "program").exists():
        binary.save(folder / "program")
        source = binary._build.parts.folder / SOURCE_FILE
        (folder / "driver").mkdir()
        build_driver(source.read_text(), folder / "driver")
    files = [folder / f"input_{index}.npy" for index in range(len(inputs))]
    for file, tensor in zip(files, inputs, strict=True):
        np.save(file, tensor.numpy())
    outputs = [f"--output={folder / f'output_{i}.npy'}" for i in range(len(binary.info.outputs))]
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    if driver:
        environment["LD_LIBRARY_PATH"] = str(folder / "driver")
    environment |= {f"EMULATED_{key.upper()}": str(value) for key, value in settings.items()}
    return subprocess.run(
        [str(folder / "program"), *outputs, *options, *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
