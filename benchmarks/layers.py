"""Single layers against the limits of the machine, one thread.

    python benchmarks/layers.py

3 x 3 convolutions of 64 to 512 channels on 56 x 56 to 7 x 7 pixels against the measured rate of
fused multiply-adds; a fully connected layer of 4096 x 4096, whose 64 MiB of weights do not fit a
cache, against the measured rate of reading memory. ONNX Runtime and OpenVINO run the same layers
in the same rounds, and so do the loops that measure the limits: this machine's clock varies.
Results go to ``benchmarks/results/layers.json`` and ``layers.md``.
"""

import argparse
from typing import Any

from machine import LimitLoops
from rich.console import Console
from rich.table import Table
from tables import RESULTS, write_json

RIVALS = ("onnxruntime", "openvino")
CHANNELS = (64, 128, 256, 512)
SIZES = (56, 28, 14, 7)


def _layer(channels: int, size: int) -> tuple[Any, Any, int, int]:
    """Module, input, operations and bytes; size 0 stands for a fully connected layer."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if size == 0:
        linear = nn.Linear(channels, channels).eval()
        return linear, torch.randn(1, channels), 2 * channels**2, 4 * channels**2
    module = nn.Conv2d(channels, channels, 3, padding=1).eval()
    operations = 2 * 9 * channels**2 * size**2
    return module, torch.randn(1, channels, size, size), operations, 4 * 9 * channels**2


def measure_layer(channels: int, size: int, rounds: int, budget: float) -> dict[str, Any]:
    """One layer: the kernel alone inside of our binary, and whole calls of the rivals."""
    import shohin
    from shohin import bench
    from shohin.rivals import make_rival

    module, x, operations, read = _layer(channels, size)
    binary = shohin.compile(shohin.capture(module, (x,)), "cpu")
    array = x.numpy()
    limits = LimitLoops(threads=1)
    kernel: list[float] = []
    functions = {
        "shohin": lambda: kernel.append(_kernel_ms(binary, array)),
        "fma": limits.run_fma,
        "read": limits.run_read,
    }
    functions |= {name: make_rival(name, module, (x,), 1).run for name in RIVALS}
    timings = bench.measure(functions, rounds, budget)
    kernel.sort()
    return {
        "layer": f"fully connected {channels}" if size == 0 else f"3x3 {channels} at {size}x{size}",
        "kernel": next(s.kernel for s in binary.info.steps if s.macs),
        "ms": kernel[len(kernel) // 2],
        "rivals": {name: timings[name].median for name in RIVALS},
        "operations": operations,
        "bytes": read,
        "gflops_limit": limits.operations / timings["fma"].median / 1e6,
        "gigabytes_limit": limits.bytes / timings["read"].median / 1e6,
    }


def _kernel_ms(binary: Any, array: Any) -> float:
    """Milliseconds of the layer itself, conversions of its input and output left out."""
    steps = binary.profile([array], runs=1)
    macs = [step.macs for step in binary.info.steps]
    return float(sum(ms for (_, ms), count in zip(steps, macs, strict=True) if count))


HEADINGS = (
    "layer", "kernel", "ms", "onnxruntime ms", "openvino ms", "GFLOP/s", "of FMA peak", "GB/s",
    "of memory bandwidth",
)  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    gflops = row["operations"] / row["ms"] / 1e6
    gigabytes = row["bytes"] / row["ms"] / 1e6
    return [
        row["layer"],
        row["kernel"],
        f"{row['ms']:.4f}",
        *(f"{row['rivals'][name]:.4f}" for name in RIVALS),
        f"{gflops:.0f}",
        f"{100 * gflops / row['gflops_limit']:.0f} %",
        f"{gigabytes:.1f}",
        f"{100 * gigabytes / row['gigabytes_limit']:.0f} %",
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of measuring a layer")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    console = Console(width=150)
    rows = []
    for channels, size in [*((c, s) for c in CHANNELS for s in SIZES), (4096, 0)]:
        row = measure_layer(channels, size, arguments.rounds, arguments.budget)
        rows.append(row)
        console.print("  ".join(_cells(row)), highlight=False)
    table = Table(title="Single layers, batch 1, one thread")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("layer", "kernel") else "right")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    write_json(RESULTS / "layers.json", rows)
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    (RESULTS / "layers.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
