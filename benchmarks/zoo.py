"""Every model of the zoo: captured, folded, compiled, run, and compared with torch.

    python benchmarks/zoo.py                       # all models, batch 1 and 4, 1 and 2 threads
    python benchmarks/zoo.py --models resnet-20,vit-tiny --rounds 31

Prints a table and writes it to ``benchmarks/results/zoo.md`` and ``zoo.json``. Each model runs in
a process of its own, so that peak memory is its own too: that of the first compilation, with the
model, its captured program and everything that Python loads included. Times are medians of
interleaved runs. Models that are not named keep their earlier results.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from typing import Any

from rich.console import Console
from rich.table import Table
from tables import RESULTS, write_json

TOLERANCE = 1e-4
HEADINGS = (
    "model", "batch", "threads", "relative error", "compile s", "peak MB", "file MB",
    "torch ms", "shohin ms", "shohin/torch",
)  # fmt: skip
CNN_LIMIT, TRANSFORMER_LIMIT = 1.5, 3.0


class PeakMemory:
    """Samples the memory of this process and its children, the linker among them."""

    def __init__(self, interval: float = 0.02) -> None:
        import psutil

        self.peak_bytes = 0
        self._process = psutil.Process()
        self._interval = interval
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        import psutil

        while True:
            total = 0
            for process in (self._process, *self._process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, total)
            time.sleep(self._interval)


def measure_model(name: str, batches: list[int], threads: list[int], rounds: int) -> dict[str, Any]:
    """Everything about one model, in this process."""
    import torch

    import shohin
    from shohin import zoo

    memory = PeakMemory()
    model = zoo.build(name)
    start = time.perf_counter()
    program = shohin.capture(model, zoo.example_inputs(name, 2))
    captured = time.perf_counter() - start
    program = shohin.optimize(program, passes="make-functional, fold-bn, eliminate-dead").program
    rows = []
    for batch in batches:
        for count in threads:
            torch.set_num_threads(count)
            rows.append(_measure(name, model, program, batch, count, rounds, memory))
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    return {
        "model": name,
        "family": zoo.entry(name).family,
        "model_mb": size / 2**20,
        "capture_s": captured,
        "peak_mb": rows[0]["peak_mb"],
        "rows": rows,
    }


def _measure(
    name: str, model: Any, program: Any, batch: int, threads: int, rounds: int, memory: PeakMemory
) -> dict[str, Any]:
    import torch

    import shohin
    from shohin import zoo
    from shohin.bench import interleaved

    memory.peak_bytes = 0
    start = time.perf_counter()
    binary = shohin.compile(program, target=f"cpu{{threads={threads}}}", batch=batch)
    compiled = time.perf_counter() - start
    peak = memory.peak_bytes
    inputs = zoo.example_inputs(name, batch)
    with torch.inference_mode():
        reference = model(*inputs)
        error = (binary(*inputs) - reference).abs().max() / reference.abs().max()
        medians = interleaved(
            {"shohin": lambda: binary(*inputs), "torch": lambda: model(*inputs)},
            rounds=rounds,
            budget=4.0,
        )
    return {
        "peak_mb": peak / 2**20,
        "batch": batch,
        "threads": threads,
        "compile_s": compiled,
        "relative_error": float(error),
        "shohin_ms": medians["shohin"],
        "torch_ms": medians["torch"],
        "file_bytes": binary.path.stat().st_size,
        "arena_bytes": binary.arena_bytes,
    }


def _run_child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--child", name, "--batches", arguments.batches,
        "--threads", arguments.threads, "--rounds", str(arguments.rounds),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _table(results: list[dict[str, Any]]) -> Table:
    table = Table(title="Zoo: compiled binary against torch eager")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for result in results:
        for row in result["rows"]:
            table.add_row(*_cells(result, row))
    return table


def _cells(result: dict[str, Any], row: dict[str, Any]) -> list[str]:
    return [
        result["model"],
        str(row["batch"]),
        str(row["threads"]),
        f"{row['relative_error']:.1e}",
        f"{row['compile_s']:.1f}",
        f"{result['peak_mb']:.0f}" if row is result["rows"][0] else "",
        f"{row['file_bytes'] / 2**20:.2f}",
        f"{row['torch_ms']:.3f}",
        f"{row['shohin_ms']:.3f}",
        f"{row['shohin_ms'] / row['torch_ms']:.2f}",
    ]


def _markdown(results: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += [
        "| " + " | ".join(_cells(result, row)) + " |"
        for result in results
        for row in result["rows"]
    ]
    return "\n".join(lines) + "\n"


def find_faults(results: list[dict[str, Any]]) -> list[str]:
    """Rows that break a limit: error, speed against torch, peak memory."""
    faults = []
    for result in results:
        limit = TRANSFORMER_LIMIT if result["family"] == "transformer" else CNN_LIMIT
        allowed = 4 * result["model_mb"] + 1024
        if result["peak_mb"] > allowed:
            faults.append(f"{result['model']}: peak memory above {allowed:.0f} MB")
        for row in result["rows"]:
            where = f"{result['model']} batch {row['batch']} threads {row['threads']}"
            if row["relative_error"] > TOLERANCE:
                faults.append(f"{where}: relative error {row['relative_error']:.1e}")
            if row["shohin_ms"] > limit * row["torch_ms"]:
                faults.append(f"{where}: {row['shohin_ms'] / row['torch_ms']:.2f}x torch's time")
    return faults


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", help="comma-separated names; all by default")
    parser.add_argument("--batches", default="1,4")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    batches = [int(item) for item in arguments.batches.split(",")]
    threads = [int(item) for item in arguments.threads.split(",")]
    if arguments.child:
        print(json.dumps(measure_model(arguments.child, batches, threads, arguments.rounds)))
        return
    from shohin import zoo

    names = arguments.models.split(",") if arguments.models else list(zoo.names())
    console = Console(stderr=True)
    RESULTS.mkdir(exist_ok=True)
    store = RESULTS / "zoo.json"
    known = json.loads(store.read_text()) if store.exists() else []
    found = {result["model"]: result for result in known}
    for name in names:
        console.print(f"measuring {name} ...")
        found[name] = _run_child(name, arguments)
    results = [found[name] for name in zoo.names() if name in found]
    write_json(store, results)
    (RESULTS / "zoo.md").write_text(_markdown(results))
    Console(width=150).print(_table(results))
    faults = find_faults(results)
    console.print("\n".join(faults) if faults else "every limit holds")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
