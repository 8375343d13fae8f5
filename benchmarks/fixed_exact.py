"""Every output integer of binaries against the reference in PyTorch, over real images."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixed_accuracy import fixed_program
from tables import Table, save

import shohin
from shohin import zoo
from shohin.backends.tvm.target import host_runs

NETWORKS = {"lenet-5": 1000, "resnet-20": 761, "squeezenet-1.1": 500}
PROCESSORS = ("x86-64-v4-vnni", "x86-64-v3-vnni", "x86-64-v3", "x86-64-v2")
EMULATED = {"arm": 100, "arm{cpu=neoverse-n1}": 100}
"""Targets that run under qemu-user, and on how many images of the smaller nets."""


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
        if host_runs(arch):
            print(f"{name}: {arch} is left out, {host_runs(arch)}")
            continue
        binary = shohin.compile(program, f"cpu{{arch={arch} threads=2 tune=off}}")
        found = np.concatenate([np.array(binary(image[None])) for image in images])
        rows.append(_row(name, arch, wanted, found))
    if name != "squeezenet-1.1" and shutil.which("qemu-aarch64"):
        for target, number in EMULATED.items():
            found = _emulated(program, target, images[:number])
            rows.append(_row(name, target, wanted[:number], found))
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
