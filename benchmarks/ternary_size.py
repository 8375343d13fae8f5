"""Bytes of ternary networks: in files, and in the memory of a running binary."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import Table, save, with_earlier
from ternary_accuracy import RECIPES, program_path
from ternary_speed import variants

import shohin
from shohin import zoo
from shohin.ir.coding import entropy_bits
from shohin.ir.ternary import Ternary

_PASSES = "fold-bn, entropy-code"


def measure_files() -> None:
    """Trained networks: bits of ternary weights, packed and coded, and whole files.

    Networks that were not trained here keep the rows of an earlier run.
    """
    trained = [_file(name) for name in RECIPES if program_path(name).exists()]
    rows = with_earlier("ternary_files", trained, RECIPES)
    table = Table(
        "Files of ternary networks; bits a ternary weight, scales and tables included",
        ("network", "float32", "bytes", "x", "packed", "coded", "entropy", "coded / entropy"),
    )
    for row in rows:
        table.add(
            row["network"],
            f"{row['float_bytes']:,}",
            f"{row['bytes']:,}",
            f"{row['float_bytes'] / row['bytes']:.1f}",
            f"{row['packed_bits']:.3f}",
            f"{row['coded_bits']:.3f}",
            f"{row['entropy_bits']:.3f}",
            f"{row['code_bits'] / row['entropy_bits']:.3f}",
        )
    save("ternary_files", rows, [table])


def measure_memory() -> None:
    """AlexNet with random weights as an executable: its file, and its resident set at most."""
    torch.manual_seed(0)
    model = zoo.build("alexnet").eval()
    images = torch.randn(4, *zoo.example_inputs("alexnet", 1)[0].shape[1:])
    rows = []
    for label, program in variants(model, images, "alexnet"):
        rows.append({"network": label, **_resident(program)})
        print(rows[-1], flush=True)
    table = Table(
        "AlexNet, random weights, running: megabytes", ("weights", "executable", "resident set")
    )
    for row in rows:
        cells = (f"{row[key] / 1e6:.1f}" for key in ("bytes", "resident"))
        table.add(row["network"], *cells)
    save("ternary_memory", rows, [table])


def _file(name: str) -> dict[str, Any]:
    program, dense = shohin.load(program_path(name)), zoo.build(RECIPES[name].network)
    packed = [one for one in program.encodings.values() if isinstance(one, Ternary)]
    folded = shohin.optimize(program, _PASSES, drift=False)
    coded = [one for one in folded.program.encodings.values() if isinstance(one, Ternary)]
    weights = sum(one.parameters() for one in packed)
    entropy = sum(entropy_bits(np.bincount(one.symbols())) for one in packed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.shohin"
        folded.save(path)
        size = path.stat().st_size
    return {
        "network": name,
        "float_bytes": 4 * sum(one.numel() for one in dense.parameters()),
        "bytes": size,
        "weights": weights,
        "packed_bits": 8 * sum(one.stored_bytes() for one in packed) / weights,
        "coded_bits": 8 * sum(one.stored_bytes() for one in coded) / weights,
        "code_bits": sum(one.code_bits() * one.parameters() for one in coded) / weights,
        "entropy_bits": entropy / weights,
    }


_MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def _resident(program: Any) -> dict[str, int]:
    """Bytes of the executable, and of the resident set of a process that runs it."""
    with tempfile.TemporaryDirectory() as folder:
        executable = Path(folder) / "net"
        shohin.compile(program, "cpu{threads=1}").save(executable)
        command = [sys.executable, "-c", _MEASURE, str(executable), "--benchmark", "20"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"bytes": executable.stat().st_size, "resident": 1024 * int(done.stdout)}
