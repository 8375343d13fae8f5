"""SqueezeNet 1.1 pruned without training: optimal brain surgeon, and magnitudes beside it."""

import time
from typing import Any

import torch
from tables import Table, save
from torch import Tensor, nn

import shohin
from shohin import zoo

NETWORK = "squeezenet-1.1"
PIPELINES = {
    "magnitude, every layer alike": "prune{density=0.398}",
    "magnitude, all layers together": "prune{density=0.398 scope=global}",
    "optimal brain surgeon": "prune{method=obs density=0.398 scope=global}",
}
_BATCH = 50


def measure_without_training() -> None:
    """Prune with 500 calibration images, and read the 500 evaluation images."""
    model = zoo.pretrained(NETWORK)
    batches, before = calibration(), accuracy(model)
    rows = [
        _measure(name, pipeline, model, batches, before) for name, pipeline in PIPELINES.items()
    ]
    headings = ("method", "x", "top-1 %", "lost", "top-5 %", "lost", "seconds")
    title = f"SqueezeNet 1.1, 500 calibration images, no training ({before[0]:.1f} % before)"
    table = Table(title, headings)
    for row in rows:
        pairs = zip(before, row["accuracy"], strict=True)
        cells = [text for old, new in pairs for text in (f"{new:.1f}", f"{old - new:.1f}")]
        table.add(row["method"], f"{row['ratio']:.2f}", *cells, f"{row['seconds']:.0f}")
    save("pruning_squeezenet", rows, [table])


def _measure(
    name: str,
    pipeline: str,
    model: nn.Module,
    batches: list[tuple[Tensor]],
    before: tuple[float, float],
) -> dict[str, Any]:
    program = shohin.capture(model, zoo.example_inputs(NETWORK, 2), name=NETWORK)
    began = time.monotonic()
    result = shohin.optimize(program, pipeline, calibration=batches, drift=False)
    seconds = time.monotonic() - began
    total, kept = (_parameters(one) for one in (model, result.program.module))
    return {
        "method": name,
        "pipeline": pipeline,
        "ratio": total / kept,
        "before": before,
        "accuracy": accuracy(result.program.module),
        "seconds": seconds,
    }


def calibration() -> list[tuple[Tensor]]:
    """The 500 calibration images in batches."""
    images, _ = zoo.calibration_set(NETWORK)
    return [(part,) for part in images.split(_BATCH)]


def accuracy(module: nn.Module) -> tuple[float, float]:
    """Top-1 and top-5 on the evaluation images, %."""
    images, labels = zoo.evaluation_set(NETWORK)
    with torch.inference_mode():
        best = torch.cat([module(part).topk(5, 1).indices for part in images.split(_BATCH)])
    right = best == labels[:, None]
    return 100 * float(right[:, 0].float().mean()), 100 * float(right.any(1).float().mean())


def _parameters(module: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in module.parameters())
