"""Deep Compression of trained networks: bytes of the file, and errors on real images."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from compression_recipes import COMPRESSIONS, Compression
from compression_tables import layer_table
from pruning_accuracy import baseline, program_path, start, trainer, training_images
from pruning_data import error
from pruning_recipes import RECIPES
from tables import Table, save

import shohin
from shohin import zoo

WORK = Path(__file__).parent / "trained" / "compression"


def measure(names: Iterable[str], seeds: Iterable[int], *, test: bool) -> None:
    """Share and code pruned networks, a file of figures for each network and seed.

    Args:
        names: in `COMPRESSIONS`.
        seeds: whose pruned networks are there.
        test: read the test images, which nothing is chosen on, for what has not read them yet.
    """
    seeds = tuple(seeds)
    for name in names:
        for seed in seeds:
            path = _path(name, seed, "json")
            row = json.loads(path.read_text()) if path.exists() else _compress(name, seed)
            if test and "test" not in row:
                row["test"] = _test_error(name, seed)
            path.write_text(json.dumps(row, indent=1) + "\n")
            print(json.dumps(row), flush=True)


def summarise() -> None:
    """Print and save what all seeds gave, and the sizes of every layer of the first."""
    rows = [json.loads(path.read_text()) for path in sorted(WORK.glob("*/*.json"))]
    rows = [row for row in rows if "test" in row]
    headings = (
        "network",
        "bytes",
        "x",
        "baseline %",
        "before %",
        "error %",
        "goal",
        "met",
        "paper",
    )
    table = Table("Pruned, shared and coded: bytes of the whole file, test errors, means", headings)
    layers = []
    for name, compression in COMPRESSIONS.items():
        found = [row for row in rows if row["name"] == name]
        if found:
            table.add(name, *_cells(compression, found))
            path = file_path(name, found[0]["seed"])
            network = RECIPES[compression.recipe].network
            layers.append(layer_table(f"{name}, seed {found[0]['seed']}", path, network))
    save("compression_networks", rows, [table, *layers])


def file_path(name: str, seed: int) -> Path:
    """Where a compressed network is kept."""
    return _path(name, seed, "shohin")


def _path(name: str, seed: int, ending: str) -> Path:
    folder = WORK / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"seed{seed}.{ending}"


def _start(compression: Compression, seed: int) -> shohin.Program:
    """The pruned network, or the one that its recipe starts from."""
    if compression.pruned:
        return shohin.load(program_path(compression.recipe, compression.pruned, seed))
    recipe = RECIPES[compression.recipe]
    inputs = zoo.example_inputs(recipe.network, 2)
    return shohin.capture(start(recipe, seed).eval(), inputs, name=recipe.network)


def _compress(name: str, seed: int) -> dict[str, Any]:
    compression = COMPRESSIONS[name]
    recipe = RECIPES[compression.recipe]
    images = training_images(recipe)
    program = _start(compression, seed)
    before = error(program.module, *images.validation)
    began = time.monotonic()
    tuning = compression.tuning
    result = shohin.optimize(
        program,
        compression.passes,
        calibration=images.calibration(compression.calibration, seed),
        train=None if tuning is None else trainer(recipe, tuning, images, seed),
        seed=seed,
        drift=False,
    )
    path = file_path(name, seed)
    result.save(path)
    model = zoo.entry(recipe.network).build()
    single = 4 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "name": name,
        "seed": seed,
        "passes": ", ".join(result.program.history),
        "bytes": path.stat().st_size,
        "single_precision": single,
        "ratio": single / path.stat().st_size,
        "validation": {
            "before": before,
            "compressed": error(result.program.module, *images.validation),
        },
        "seconds": round(time.monotonic() - began),
    }


def _test_error(name: str, seed: int) -> dict[str, float]:
    """Errors of the file as it is read again, of what it was made from, and of the baseline."""
    compression = COMPRESSIONS[name]
    recipe = RECIPES[compression.recipe]
    evaluation = zoo.evaluation_set(recipe.images)
    modules = {
        "compressed": shohin.load(file_path(name, seed)).module,
        "before": _start(compression, seed).module,
        "baseline": baseline(recipe, training_images(recipe), seed).eval(),
    }
    return {key: error(module, *evaluation) for key, module in modules.items()}


def _cells(compression: Compression, rows: list[dict[str, Any]]) -> tuple[str, ...]:
    size, ratio = max(row["bytes"] for row in rows), min(row["ratio"] for row in rows)
    unpruned, before, found = (
        mean(row["test"][key] for row in rows) for key in ("baseline", "before", "compressed")
    )
    most = compression.most_error + (unpruned if compression.relative else 0)
    small = size <= (compression.most_bytes or size) and ratio >= compression.least
    limit = (
        f"{compression.most_bytes:,} bytes" if compression.most_bytes else f"{compression.least:g}x"
    )
    errors = ", ".join(f"{row['test']['compressed']:.2f}" for row in rows)
    return (
        f"{size:,}",
        f"{ratio:.1f}",
        f"{unpruned:.2f}",
        f"{before:.2f}",
        f"{found:.2f} ({errors})",
        f"{limit}, {most:.2f} %",
        "yes" if small and found <= most else "no",
        compression.paper,
    )
