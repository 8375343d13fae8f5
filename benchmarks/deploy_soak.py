"""A model that runs a million times in one process, and instances that come and go."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tables import Table, save
from torch import nn

import shohin

_SOURCE = Path(__file__).with_suffix(".c")


def measure_soak() -> None:
    """Wrong outputs, and growth of memory, of many runs and many instances."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    program = shohin.capture(nn.Sequential(*layers).eval(), torch.randn(2, 1, 8, 8), name="net")
    program = shohin.optimize(program, "prune{density=0.3}", drift=False).program
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shohin.compile(program, weights="compressed").save(folder / "net.a")
        compiler = [sys.executable, "-m", "ziglang", "cc", "-O2", "-Wall", "-Werror"]
        parts = [f"-I{folder}", _SOURCE, folder / "net.a", "-pthread", "-lm"]
        command = [*compiler, *parts, "-o", folder / "soak"]
        subprocess.run([str(word) for word in command], check=True)
        done = subprocess.run([str(folder / "soak")], check=True, capture_output=True, text=True)
    rows = [dict(zip(_FIELDS, line.split(","), strict=True)) for line in done.stdout.splitlines()]
    table = Table("Four instances on four threads, weights decoded for the first", _FIELDS)
    for row in rows:
        table.add(*row.values())
    save("deploy_soak", rows, [table])


_FIELDS = ("what", "times", "wrong", "KB before", "KB after")
