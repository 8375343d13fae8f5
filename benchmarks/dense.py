"""Uncompressed models: shohin against torch eager, torch.compile, ONNX Runtime and OpenVINO.

    python benchmarks/dense.py                              # every CNN, batch 1 and 8
    python benchmarks/dense.py --models resnet-20 --layers  # and every layer against the limits
    python benchmarks/dense.py --tiles resnet-18            # the tile each kernel got, and why

Interleaved medians, every runtime with the same threads; OpenVINO at f32 precision. Results go to
``benchmarks/results/dense.json``, ``dense.md`` and ``dense.png``. Each model is measured in a
process of its own; a run that was interrupted goes on where it stopped unless ``--fresh`` is given.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import measure_limits
from rich.console import Console
from rich.table import Table
from tables import RESULTS, write_json

RIVALS = ("torch", "compile", "onnxruntime", "openvino")
FLOOR = 0.85


def measure_model(
    name: str, batch: int, threads: int, rounds: int, budget: float
) -> dict[str, Any]:
    """One model at one batch size and number of threads, in this process."""
    import torch

    import shohin
    from shohin import bench, zoo
    from shohin.rivals import make_rival

    torch.set_num_threads(threads)
    model, inputs = zoo.build(name), zoo.example_inputs(name, batch)
    program = shohin.capture(model, zoo.example_inputs(name, 2), name=name)
    program = shohin.optimize(program, "make-functional, fold-bn, eliminate-dead").program
    binary = shohin.compile(program, f"cpu{{threads={threads}}}", batch=batch)
    arrays = [tensor.numpy() for tensor in inputs]
    functions = {"shohin": lambda: binary(*arrays)}
    functions |= {rival: make_rival(rival, model, inputs, threads).run for rival in RIVALS}
    torch.set_num_threads(threads)
    timings = bench.measure(functions, rounds, budget)
    with torch.inference_mode():
        reference = model(*inputs)
    error = float((binary(*inputs) - reference).abs().max() / reference.abs().max())
    steps = binary.profile(arrays, runs=15)
    return {
        "model": name,
        "batch": batch,
        "threads": threads,
        "relative_error": error,
        "milliseconds": {key: timing.median for key, timing in timings.items()},
        "quartiles": {key: [timing.low, timing.high] for key, timing in timings.items()},
        "operations": sum(2 * step.macs for step in binary.info.steps),
        "bytes": binary.constant_bytes + sum(array.nbytes for array in arrays),
        "layers": [
            {
                "label": label,
                "kernel": step.kernel,
                "ms": ms,
                "operations": 2 * step.macs,
                "bytes": step.bytes,
            }
            for (label, ms), step in zip(steps, binary.info.steps, strict=True)
        ],
    }


def fastest_rival(row: dict[str, Any]) -> tuple[str, float]:
    """The rival with the least time, and its milliseconds."""
    times = {key: value for key, value in row["milliseconds"].items() if key != "shohin"}
    best = min(times, key=lambda key: times[key])
    return best, times[best]


def speed(row: dict[str, Any]) -> float:
    """How many times as fast as the fastest rival."""
    return float(fastest_rival(row)[1] / row["milliseconds"]["shohin"])


def _child(name: str, batch: int, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--child", f"{name},{batch},{threads}",
        "--rounds", str(arguments.rounds), "--budget", str(arguments.budget),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _table(rows: list[dict[str, Any]], limits: dict[int, dict[str, float]]) -> Table:
    table = Table(title="Milliseconds, interleaved medians")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        table.add_row(*_cells(row, limits))
    return table


HEADINGS = (
    "model", "batch", "threads", "torch", "compile", "onnxruntime", "openvino", "shohin",
    "fastest rival / shohin", "share of FMA peak", "share of bandwidth", "relative error",
)  # fmt: skip


def _cells(row: dict[str, Any], limits: dict[int, dict[str, float]]) -> list[str]:
    times = row["milliseconds"]
    gflops = row["operations"] / times["shohin"] / 1e6
    share = gflops / limits[row["threads"]]["gflops"]
    gigabytes = row["bytes"] / times["shohin"] / 1e6
    bandwidth = gigabytes / limits[row["threads"]]["gigabytes"]
    return [
        row["model"],
        str(row["batch"]),
        str(row["threads"]),
        *(f"{times[key]:.3f}" for key in (*RIVALS, "shohin")),
        f"{speed(row):.2f}",
        f"{100 * share:.0f} %",
        f"{100 * bandwidth:.0f} %",
        f"{row['relative_error']:.0e}",
    ]


def _layers_table(row: dict[str, Any], limits: dict[int, dict[str, float]]) -> Table:
    limit = limits[row["threads"]]
    title = f"{row['model']}, batch {row['batch']}, {row['threads']} threads"
    table = Table(title=title)
    for heading in (
        "layer",
        "kernel",
        "ms",
        "GFLOP/s",
        "of FMA peak",
        "GB/s",
        "of memory bandwidth",
    ):
        table.add_column(heading, justify="left" if heading in ("layer", "kernel") else "right")
    for layer in row["layers"]:
        gflops = layer["operations"] / max(layer["ms"], 1e-9) / 1e6
        gigabytes = layer["bytes"] / max(layer["ms"], 1e-9) / 1e6
        table.add_row(
            layer["label"],
            layer["kernel"],
            f"{layer['ms']:.4f}",
            f"{gflops:.0f}",
            f"{100 * gflops / limit['gflops']:.0f} %",
            f"{gigabytes:.1f}",
            f"{100 * gigabytes / limit['gigabytes']:.0f} %",
        )
    return table


def _tiles_table(name: str, threads: int) -> Table:
    """The tile of every kernel of a model, what it was compared with, and why it was chosen."""
    import tempfile

    import shohin
    from shohin import zoo
    from shohin.backends.tvm.kernels.emit import Kernel
    from shohin.backends.tvm.lowering.lower import lower
    from shohin.backends.tvm.target import CpuTarget
    from shohin.backends.tvm.tuning.explain import explain
    from shohin.backends.tvm.tuning.tuner import Tuner

    program = shohin.capture(zoo.build(name), zoo.example_inputs(name, 2), name=name)
    program = shohin.optimize(program, "make-functional, fold-bn, eliminate-dead").program
    tuner = Tuner(CpuTarget(threads=threads))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constants.bin"
        plan = lower(program, tuner, 1, path, lambda done, total, label: None)
    table = Table(title=f"{name}, batch 1: tiles")
    for heading in ("layer", "kernel", "tile", "why", "measured, in the cost model's order"):
        table.add_column(heading, overflow="fold")
    for call in plan.calls:
        if not isinstance(call.kernel, Kernel) or not call.kernel.tile_text():
            continue
        choice = explain(call.kernel, tuner)
        measured = [f"{tile}: {ms:.4f}" for tile, ms in choice.candidates if ms is not None]
        family = call.kernel.family
        table.add_row(call.label, family, choice.tile, choice.reason, ", ".join(measured))
    return table


def geometric_mean(values: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _summary(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for batch, threads in sorted({(row["batch"], row["threads"]) for row in rows}):
        chosen = [row for row in rows if (row["batch"], row["threads"]) == (batch, threads)]
        speeds = {row["model"]: speed(row) for row in chosen}
        slowest = min(speeds, key=lambda name: speeds[name])
        lines.append(
            f"batch {batch}, {threads} threads: geometric mean over {len(speeds)} models "
            f"{geometric_mean(list(speeds.values())):.3f}x the fastest rival of each; "
            f"least {speeds[slowest]:.2f}x ({slowest})"
        )
    return lines


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({(row["batch"], row["threads"]) for row in rows})
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(11, 3 * len(groups)), squeeze=False)
    for axis, (batch, threads) in zip(axes[:, 0], groups, strict=True):
        chosen = {r["model"]: r for r in rows if (r["batch"], r["threads"]) == (batch, threads)}
        shown = [name for name in names if name in chosen]
        width = 0.8 / len(RIVALS)
        for index, rival in enumerate(RIVALS):
            ratios = [
                chosen[n]["milliseconds"][rival] / chosen[n]["milliseconds"]["shohin"]
                for n in shown
            ]
            places = [i + (index - 1.5) * width for i in range(len(shown))]
            axis.bar(places, ratios, width, label=rival)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set_yscale("log", base=2)
        axis.set_xticks(range(len(shown)), shown, rotation=20, ha="right")
        axis.set_ylabel("rival's time / shohin's")
        axis.set_title(f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}")
        axis.legend(ncols=4, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _markdown(rows: list[dict[str, Any]], limits: dict[int, dict[str, float]]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(_cells(row, limits)) + " |" for row in rows]
    machine = [
        f"{count} threads: {limit['gflops']:.0f} GFLOP/s, {limit['gigabytes']:.1f} GB/s"
        for count, limit in limits.items()
    ]
    return "\n".join([*lines, "", *(f"- {line}" for line in _summary(rows)), "", *machine, ""])


def main() -> None:
    """Run the benchmark."""
    arguments = _arguments()
    if arguments.child:
        name, batch, threads = arguments.child.split(",")
        row = measure_model(name, int(batch), int(threads), arguments.rounds, arguments.budget)
        print(json.dumps(row))
        return
    from shohin import zoo

    console = Console(width=170)
    if arguments.tiles:
        console.print(_tiles_table(arguments.tiles, threads=1))
        return
    cnns = [name for name in zoo.names() if zoo.entry(name).family == "cnn"]
    names = arguments.models.split(",") if arguments.models else cnns
    threads = [int(item) for item in arguments.threads.split(",")]
    batches = [int(item) for item in arguments.batches.split(",")]
    store = RESULTS / "dense.json"
    known = store.exists() and not arguments.fresh
    earlier = json.loads(store.read_text()) if known else {"limits": {}, "rows": []}
    rows = earlier["rows"]
    limits = {int(count): limit for count, limit in earlier["limits"].items()}
    limits |= {count: vars(measure_limits(count)) for count in threads if count not in limits}
    for batch in batches:
        for count in threads:
            for name in names:
                key = (name, batch, count)
                if any((r["model"], r["batch"], r["threads"]) == key for r in rows):
                    continue
                row = _child(name, batch, count, arguments)
                rows.append(row)
                write_json(store, {"limits": limits, "rows": rows})
                console.print(f"{name} batch {batch} threads {count}: {speed(row):.2f}x")
    rows.sort(key=lambda row: (row["batch"], row["threads"]))
    console.print(_table(rows, limits))
    if arguments.layers:
        for row in (row for row in rows if row["model"] in names):
            console.print(_layers_table(row, limits))
    for line in _summary(rows):
        console.print(line)
    (RESULTS / "dense.md").write_text(_markdown(rows, limits))
    _draw(rows, RESULTS / "dense.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", help="comma-separated names; every CNN by default")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of measuring a row")
    parser.add_argument("--layers", action="store_true", help="print every layer")
    parser.add_argument("--tiles", metavar="MODEL", help="print why each kernel has its tile")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
