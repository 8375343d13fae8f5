"""What retraining, rounds and the kind of penalty are worth: error over density, LeNet-300-100.

Figure 5 of Han et al. (arXiv 1506.02626): L1 beats L2 as long as nothing is retrained, L2 wins
after retraining, and pruning in rounds beats pruning at once.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import torch
from pruning_accuracy import WORK
from pruning_data import Images, error, load_images
from tables import RESULTS, Table, save
from torch import nn

import shohin
from shohin import zoo

NETWORK = "lenet-300-100"
DENSITIES = (0.4, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01)
EPOCHS = 20
"""Of retraining in all; rounds share them."""

_LEARNING_RATE = 0.02
_BASELINE_EPOCHS = 20
_PENALTIES = {"L1": {"l1": 3e-5}, "L2": {"weight_decay": 5e-4}}
"""Of the baseline and of retraining: the strongest of a coarse grid that leave the baseline's
validation error where it is."""


@dataclass(frozen=True)
class Curve:
    """A way to prune.

    Attributes:
        penalty: of the training and of the retraining.
        rounds: of pruning and retraining; 0 for no retraining.
    """

    penalty: str
    rounds: int

    @property
    def label(self) -> str:
        """For people."""
        how = {0: "not retrained", 1: "one shot, retrained"}.get(self.rounds)
        return f"{self.penalty}, {how or f'{self.rounds} rounds, retrained'}"


CURVES = (Curve("L1", 0), Curve("L2", 0), Curve("L1", 1), Curve("L2", 1), Curve("L2", 5))


def measure_curves(seeds: list[int]) -> None:
    """Measure every curve for every seed, on validation images; draw and save the means."""
    images = load_images(NETWORK, batch=128, shift=1, mirror=False)
    for seed in seeds:
        for penalty in _PENALTIES:
            _measure_penalty(penalty, seed, images)
    _summarise(seeds)


def _measure_penalty(penalty: str, seed: int, images: Images) -> None:
    path = WORK / "curves" / f"{penalty}-seed{seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    curves = [curve for curve in CURVES if curve.penalty == penalty]
    if all(curve.label in found for curve in curves):
        return
    model = _baseline(penalty, seed, images)
    found["baseline"] = error(model, *images.validation)
    for curve in curves:
        if curve.label not in found:
            found[curve.label] = [_point(model, curve, one, seed, images) for one in DENSITIES]
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(seed, curve.label, found[curve.label], flush=True)


def _baseline(penalty: str, seed: int, images: Images) -> nn.Module:
    torch.manual_seed(seed)
    model = zoo.entry(NETWORK).build()
    _trainer(penalty, seed, images, _BASELINE_EPOCHS, 0.05)(model)
    return model.eval()


def _trainer(
    penalty: str, seed: int, images: Images, epochs: int, learning_rate: float
) -> shohin.Trainer:
    options: Mapping[str, Any] = _PENALTIES[penalty]
    return shohin.Trainer(
        images.training, epochs=epochs, learning_rate=learning_rate, seed=seed, **options
    )


def _point(model: nn.Module, curve: Curve, density: float, seed: int, images: Images) -> float:
    """Error of the pruned network, %."""
    program = shohin.capture(model, zoo.example_inputs(NETWORK, 2), name=NETWORK)
    rounds = max(1, curve.rounds)
    retrain = "auto" if curve.rounds else "none"
    trainer = _trainer(curve.penalty, seed, images, EPOCHS // rounds, _LEARNING_RATE)
    result = shohin.optimize(
        program,
        f"prune{{density={density} rounds={rounds} retrain={retrain}}}",
        train=trainer if curve.rounds else None,
        seed=seed,
        drift=False,
    )
    return error(result.program.module, *images.validation)


def _summarise(seeds: list[int]) -> None:
    means = {curve.label: _means(curve, seeds) for curve in CURVES}
    count = len(seeds)
    title = f"LeNet-300-100, validation error % over density, mean of {count} seeds"
    table = Table(title, ("", *(f"{density:g}" for density in DENSITIES)))
    for label, values in means.items():
        table.add(label, *(f"{value:.2f}" for value in values))
    save("pruning_curves", [{"densities": DENSITIES, "seeds": seeds, "error": means}], [table])
    _draw(means)


def _means(curve: Curve, seeds: list[int]) -> list[float]:
    paths = [WORK / "curves" / f"{curve.penalty}-seed{seed}.json" for seed in seeds]
    found = [json.loads(path.read_text())[curve.label] for path in paths]
    return [mean(values) for values in zip(*found, strict=True)]


def _draw(means: Mapping[str, list[float]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for curve in CURVES:
        style = "--" if curve.rounds == 0 else "-"
        colour = {"L1": "tab:orange", "L2": "tab:blue"}[curve.penalty]
        colour = "tab:green" if curve.rounds > 1 else colour
        axes.plot(DENSITIES, means[curve.label], style, color=colour, marker="o", label=curve.label)
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(DENSITIES, [f"{100 * density:g}" for density in DENSITIES])
    axes.set_xlabel("weights kept, %")
    axes.set_yscale("log")
    axes.set_yticks([1, 2, 5, 10, 20, 50, 90], ["1", "2", "5", "10", "20", "50", "90"])
    axes.minorticks_off()
    axes.set_ylabel("validation error, %")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(RESULTS / "pruning_curves.png", dpi=150)
    plt.close(figure)
