"""Pruned networks on real images: how small, and how many errors."""

import json
import os
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from pruning_data import Distilled, Images, Remembered, ask, distillation, error, load_images
from pruning_recipes import RECIPES, Goal, Recipe, Training
from tables import Table, save
from torch import Tensor, nn

import shohin
from shohin import zoo

_SEEDS = 3
"""A goal is met in the mean of so many."""

WORK = Path(__file__).parent / "trained" / "pruning"
_HAS_BFLOAT16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
"""Where a processor has no instructions for it, bfloat16 takes many times as long."""


def measure(
    networks: Iterable[str], goals: Collection[str], seeds: Iterable[int], *, test: bool
) -> None:
    """Train and prune networks, a file of figures for each network and seed.

    What is there already is not done again, and a training that was interrupted goes on after its
    last round.

    Args:
        networks: names in `RECIPES`.
        goals: names of goals; others of the networks are left out.
        seeds: of the trainings.
        test: read the test images, which nothing is chosen on, for what has not read them yet.
    """
    seeds = tuple(seeds)
    for recipe in (RECIPES[name] for name in networks):
        chosen = {name: goal for name, goal in recipe.goals.items() if name in goals}
        recipe = replace(recipe, goals=chosen)
        images = training_images(recipe)
        for seed in seeds:
            _measure_seed(recipe, images, seed, test)


def summarise() -> None:
    """Print and save what all seeds gave, and the mean of each goal's."""
    rows = [
        json.loads(path.read_text())
        for name in RECIPES
        for path in sorted(WORK.glob(f"{name.replace(' ', '-')}/*/*.json"))
    ]
    rows = [row for row in rows if "test" in row]
    headings = ("network", "goal", "x", "baseline error %", "error %", "seeds", "goal %", "met")
    table = Table("Pruned and retrained networks, test errors, means", headings)
    for recipe in RECIPES.values():
        for name, goal in recipe.goals.items():
            found = [row for row in rows if (row["recipe"], row["goal"]) == (recipe.name, name)]
            if found:
                table.add(recipe.name, name, *_cells(goal, found))
    save("pruning_accuracy", rows, [table])


def program_path(recipe: str, goal: str, seed: int) -> Path:
    """Where a pruned network is kept."""
    return _folder(recipe, seed) / f"{goal}.shohin"


def _cells(goal: Goal, rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    unpruned, pruned = (mean(row[key]["test"] for row in rows) for key in ("baseline", "pruned"))
    first = min((row["start"]["test"] for row in rows if "start" in row), default=unpruned)
    unpruned = min(unpruned, first)
    ratio = min(row["ratio"] for row in rows)
    most = unpruned + goal.most if goal.relative else goal.most
    met = ratio >= goal.least and pruned <= most
    seeds = {row["seed"] for row in rows}
    errors = ", ".join(f"{row['pruned']['test']:.2f}" for row in rows)
    return (
        f"{ratio:.1f}",
        f"{unpruned:.2f}",
        f"{pruned:.2f} ({errors})",
        str(len(rows)),
        f"{most:.2f}",
        ("yes" if met else "no") if len(seeds) >= _SEEDS else "",
    )


def _measure_seed(recipe: Recipe, images: Images, seed: int, test: bool) -> None:
    folder = _folder(recipe.name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    dense = baseline(recipe, images, seed) if recipe.from_baseline else start(recipe, seed)
    for name, goal in recipe.goals.items():
        row = _known(folder / f"{name}.json")
        if row.get("passes") != goal.passes:
            row = _prune(recipe, name, goal, dense.eval(), images, seed)
            _write(folder / f"{name}.json", row)
    # After the pruned networks, which other benchmarks go on from.
    unpruned = baseline(recipe, images, seed).eval()
    for name, goal in recipe.goals.items():
        row = _known(folder / f"{name}.json")
        if "baseline" not in row:
            row["baseline"] = {"validation": error(unpruned, *images.validation)}
        if test and "test" not in row:
            pruned = shohin.load(program_path(recipe.name, name, seed)).module
            modules: dict[str, nn.Module] = {"baseline": unpruned, "pruned": pruned}
            if goal.retraining.teacher and goal.retraining.teacher == recipe.pretrained:
                modules["start"] = start(recipe, seed).eval()
            for key, module in modules.items():
                found = error(module, *zoo.evaluation_set(recipe.images))
                row[key] = {**row.get(key, {}), "test": found}
            row["test"] = True
        _write(folder / f"{name}.json", row)


def _known(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _write(path: Path, row: dict[str, Any]) -> None:
    path.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row), flush=True)


def baseline(recipe: Recipe, images: Images, seed: int) -> nn.Module:
    """The network trained without pruning, from its file where there is one."""
    path = _folder(recipe.name, seed) / "baseline.pt"
    model = start(recipe, seed)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        trainer(recipe, recipe.baseline, images, seed)(model)
        torch.save(model.state_dict(), path)
    return model


def start(recipe: Recipe, seed: int) -> nn.Module:
    """The network before any training here, in the memory format that trains fastest."""
    if recipe.pretrained:
        model = zoo.pretrained(recipe.pretrained)
    else:
        torch.manual_seed(seed)
        model = zoo.entry(recipe.network).build()
    return model.to(memory_format=torch.channels_last)


def _prune(
    recipe: Recipe, name: str, goal: Goal, dense: nn.Module, images: Images, seed: int
) -> dict[str, Any]:
    began = time.monotonic()
    program = shohin.capture(dense, zoo.example_inputs(recipe.network, 2), name=recipe.network)
    result = shohin.optimize(
        program,
        goal.passes,
        calibration=images.calibration(goal.calibration, seed),
        train=trainer(recipe, goal.retraining, images, seed),
        seed=seed,
        workdir=_folder(recipe.name, seed) / f"{name}.rounds",
        resume=True,
        drift=False,
    )
    path = program_path(recipe.name, name, seed)
    result.save(path)
    before, after = _parameters(dense), _parameters(result.program.module)
    return {
        "recipe": recipe.name,
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


def training_images(recipe: Recipe) -> Images:
    """The images that a recipe trains, validates and calibrates with."""
    return load_images(recipe.images, recipe.batch, recipe.shift, recipe.mirror)


def trainer(recipe: Recipe, training: Training, images: Images, seed: int) -> shohin.Trainer:
    def progress(done: int, total: int, label: str) -> None:
        print(f"{recipe.name} {seed}: {label}", flush=True)

    options: dict[str, Any] = {
        "epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "precision": recipe.precision if _HAS_BFLOAT16 else "float32",
        "seed": 1000 * (seed + 1),
        "progress": progress,
    }
    if not training.teacher:
        return shohin.Trainer(images.training, **options)
    teacher = zoo.pretrained(training.teacher).to(memory_format=torch.channels_last).eval()
    batches = (
        Remembered(images.training, _said(training.teacher, teacher, images))
        if training.ask == "once"
        else Distilled(images.training, teacher, recipe.precision)
    )
    return shohin.Trainer(batches, loss=distillation, **options)


def _said(name: str, teacher: nn.Module, images: Images) -> Tensor:
    """What a teacher says of the training images, from its file where there is one."""
    path = WORK / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(ask(teacher, images.training.images), partial)
        partial.rename(path)
    found: Tensor = torch.load(path, weights_only=True)
    return found


def _parameters(module: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in module.parameters())


def _folder(recipe: str, seed: int) -> Path:
    return WORK / recipe.replace(" ", "-") / f"seed{seed}"
