"""Pruned networks on real images: how small, and how many errors."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pruning_data import Distilled, Images, distillation, error, load_images
from pruning_recipes import RECIPES, Goal, Recipe, Training
from tables import Table, save
from torch import nn

import shohin
from shohin import zoo

_SEEDS = 3
"""A goal is met in the mean of so many."""

WORK = Path(__file__).parent / "trained" / "pruning"


def measure(networks: Iterable[str], seeds: Iterable[int], *, test: bool) -> None:
    """Train and prune networks, a file of figures for each network and seed.

    What is there already is not done again, and a training that was interrupted goes on after its
    last round.

    Args:
        networks: names in `RECIPES`.
        seeds: of the trainings.
        test: read the test images, which nothing is chosen on, for what has not read them yet.
    """
    seeds = tuple(seeds)
    for recipe in (RECIPES[name] for name in networks):
        images = load_images(recipe.images, recipe.batch, recipe.shift, recipe.mirror)
        for seed in seeds:
            _measure_seed(recipe, images, seed, test)


def summarise() -> None:
    """Print and save what all seeds gave, and the mean of each goal's."""
    rows = [
        json.loads(path.read_text())
        for name in RECIPES
        for path in sorted(WORK.glob(f"{name}/*/*.json"))
    ]
    rows = [row for row in rows if "test" in row]
    headings = ("network", "goal", "x", "baseline error %", "error %", "seeds", "goal %", "met")
    table = Table("Pruned and retrained networks, test errors, means", headings)
    for recipe in RECIPES.values():
        for name, goal in recipe.goals.items():
            found = [row for row in rows if (row["network"], row["goal"]) == (recipe.network, name)]
            if found:
                table.add(recipe.network, name, *_cells(goal, found))
    save("pruning_accuracy", rows, [table])


def program_path(network: str, goal: str, seed: int) -> Path:
    """Where a pruned network is kept."""
    return _folder(network, seed) / f"{goal}.shohin"


def _cells(goal: Goal, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    baseline, pruned = (mean(row[key]["test"] for row in rows) for key in ("baseline", "pruned"))
    start = min((row["start"]["test"] for row in rows if "start" in row), default=baseline)
    baseline = min(baseline, start)
    ratio = min(row["ratio"] for row in rows)
    most = baseline + goal.most if goal.relative else goal.most
    met = ratio >= goal.least and pruned <= most
    seeds = {row["seed"] for row in rows}
    errors = ", ".join(f"{row['pruned']['test']:.2f}" for row in rows)
    return (
        f"{ratio:.1f}",
        f"{baseline:.2f}",
        f"{pruned:.2f} ({errors})",
        str(len(rows)),
        f"{most:.2f}",
        ("yes" if met else "no") if len(seeds) >= _SEEDS else "",
    )


def _measure_seed(recipe: Recipe, images: Images, seed: int, test: bool) -> None:
    folder = _folder(recipe.network, seed)
    folder.mkdir(parents=True, exist_ok=True)
    baseline = _baseline(recipe, images, seed)
    start = baseline if recipe.from_baseline else _start(recipe, seed)
    for name, goal in recipe.goals.items():
        path = folder / f"{name}.json"
        row = json.loads(path.read_text()) if path.exists() else None
        if row is None or row["passes"] != goal.passes:
            row = _prune(recipe, name, goal, start.eval(), images, seed)
            row["baseline"] = {"validation": error(baseline.eval(), *images.validation)}
        if test and "test" not in row:
            pruned = shohin.load(program_path(recipe.network, name, seed)).module
            modules = {"baseline": baseline, "pruned": pruned}
            if goal.retraining.distil:
                modules["start"] = _start(recipe, seed).eval()
            for key, module in modules.items():
                found = error(module, *zoo.evaluation_set(recipe.images))
                row[key] = {**row.get(key, {}), "test": found}
            row["test"] = True
        path.write_text(json.dumps(row, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def _baseline(recipe: Recipe, images: Images, seed: int) -> nn.Module:
    """The network trained without pruning, from its file where there is one."""
    path = _folder(recipe.network, seed) / "baseline.pt"
    model = _start(recipe, seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        trainer(recipe, recipe.baseline, images, seed)(model)
        torch.save(model.state_dict(), path)
    return model


def _start(recipe: Recipe, seed: int) -> nn.Module:
    """The network before any training here, in the memory format that trains fastest."""
    if recipe.pretrained:
        model = zoo.pretrained(recipe.pretrained)
    else:
        torch.manual_seed(seed)
        model = zoo.entry(recipe.network).build()
    return model.to(memory_format=torch.channels_last)


def _prune(
    recipe: Recipe, name: str, goal: Goal, start: nn.Module, images: Images, seed: int
) -> dict[str, Any]:
    began = time.monotonic()
    program = shohin.capture(start, zoo.example_inputs(recipe.network, 2), name=recipe.network)
    result = shohin.optimize(
        program,
        goal.passes,
        calibration=images.calibration(goal.calibration, seed),
        train=trainer(recipe, goal.retraining, images, seed),
        seed=seed,
        workdir=_folder(recipe.network, seed) / f"{name}.rounds",
        resume=True,
        drift=False,
    )
    path = program_path(recipe.network, name, seed)
    result.save(path)
    before, after = _parameters(start), _parameters(result.program.module)
    return {
        "network": recipe.network,
        "goal": name,
        "seed": seed,
        "passes": goal.passes,
        "parameters": before,
        "kept": after,
        "ratio": before / after,
        "pruned": {"validation": error(result.program.module, *images.validation)},
        "bytes": path.stat().st_size,
        "seconds": round(time.monotonic() - began),
    }


def trainer(recipe: Recipe, training: Training, images: Images, seed: int) -> shohin.Trainer:
    def progress(done: int, total: int, label: str) -> None:
        print(f"{recipe.network} {seed}: {label}", flush=True)

    options: dict[str, Any] = {
        "epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "precision": recipe.precision,
        "seed": 1000 * (seed + 1),
        "progress": progress,
    }
    if not training.distil:
        return shohin.Trainer(images.training, **options)
    teacher = _start(recipe, seed).eval()
    batches = Distilled(images.training, teacher, recipe.precision)
    return shohin.Trainer(batches, loss=distillation, **options)


def _parameters(module: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in module.parameters())


def _folder(network: str, seed: int) -> Path:
    return WORK / network / f"seed{seed}"
