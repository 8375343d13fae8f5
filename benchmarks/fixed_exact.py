"""Every output integer of binaries against the reference in PyTorch, over real images.

Code for ``x86-64-v3-vnni`` runs anywhere: where a processor lacks its instructions, the emulation
that the tests use carries them out.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixed_accuracy import fixed_program
from tables import Table, save

import shohin
from shohin import zoo
from shohin.backends.tvm.target import host_runs

sys.path.append(str(Path(__file__).parents[1] / "tests" / "backends" / "tvm"))
import avx_vnni

NETWORKS = {"lenet-5": 1000, "resnet-20": 761, "squeezenet-1.1": 500}
PROCESSORS = ("x86-64-v4-vnni", "x86-64-v3-vnni", "x86-64-v3", "x86-64-v2")
ARM = ("arm", "arm{cpu=neoverse-n1}")
ARM_IMAGES = {"lenet-5": 1000, "resnet-20": 100}
VNNI_IMAGES = {"lenet-5": 200, "resnet-20": 10}
"""On how many images emulated processors try a network; others are too large for them."""


def measure_exactness() -> None:
    """Images whose outputs differ in any bit."""
    rows = [row for name, count in NETWORKS.items() for row in _measure(name, count)]
    table = Table("Outputs against the reference", ("network", "target", "images", "unequal"))
    for row in rows:
        table.add(row["network"], row["target"], str(row["images"]), str(row["unequal"]))
    save("fixed_exact", rows, [table])


def _measure(name: str, count: int) -> list[dict[str, Any]]:
    images, _ = zoo.evaluation_set(name)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]]
    program, _ = fixed_program(name, "weights=8 data=8")
    with torch.inference_mode():
        wanted = torch.cat([program.module(part) for part in images.split(50)]).numpy()
    rows = []
    for arch in PROCESSORS:
        number = VNNI_IMAGES.get(name, 0) if host_runs(arch) else count
        with pytest.MonkeyPatch.context() as patch:
            problem = avx_vnni.allow(patch, arch)
            if problem or not number:
                print(f"{name}: {arch} is left out, {problem or 'emulation would take too long'}")
                continue
            binary = shohin.compile(program, f"cpu{{arch={arch} threads=1 tune=off}}")
            found = np.concatenate([np.array(binary(image[None])) for image in images[:number]])
        rows.append(_row(name, arch, wanted[:number], found))
    few = ARM_IMAGES.get(name, 0)
    for target in ARM if few and shutil.which("qemu-aarch64") else ():
        found = _emulated(program, target, images[:few])
        rows.append(_row(name, target, wanted[:few], found))
    return rows


def _emulated(program: Any, target: str, images: torch.Tensor) -> Any:
    binary = shohin.compile(program, target)
    with tempfile.TemporaryDirectory() as folder:
        executable = binary.save(Path(folder) / "net")
        return np.concatenate([_run(executable, image[None].numpy()) for image in images])


def _run(executable: Path, image: Any) -> Any:
    source, result = executable.with_name("x.npy"), executable.with_name("y.npy")
    np.save(source, image)
    command = ["qemu-aarch64", "-cpu", "max", executable, source, "--output", result]
    subprocess.run(command, check=True, capture_output=True)
    return np.load(result)


def _row(name: str, target: str, wanted: Any, found: Any) -> dict[str, Any]:
    unequal = int((wanted != found).reshape(len(wanted), -1).any(1).sum())
    row = {"network": name, "target": target, "images": len(wanted), "unequal": unequal}
    print(row, flush=True)
    return row
