"""Accuracy of fixed-point networks: the table of Qiu et al. 2016 on our nets, rivals beside it."""

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fixed_rivals import RIVALS
from fixed_rivals import accuracy as rival_accuracy
from tables import Table, save
from torch import Tensor, nn

import shohin
from shohin import zoo
from shohin.ir.program import Program

NETWORKS = ("lenet-5", "resnet-20", "resnet-32", "squeezenet-1.1")
CALIBRATION = 100
"""Images to choose formats on: training images, or the calibration samples."""

_RESULTS = Path(__file__).parent / "results" / "fixed_accuracy.json"

WIDTHS: Mapping[str, str] = {
    "16/16": "weights=16 data=16",
    "16/8": "weights=8 data=16",
    "8/8": "weights=8 data=8",
    "8/4": "weights=8 data=8 fc_weights=4",
}
"""Bits of data and of weights; 8/4 is 8 for data and convolutions, 4 for linear maps."""

EXTRAS: Mapping[str, str] = {
    "8/8 dynamic, biases corrected": "correct_bias=true",
    "8/8 dynamic, by channel, biases corrected": "by_channel=true correct_bias=true",
    "8/8 dynamic, all of these, squared errors": (
        "by_channel=true correct_bias=true error=squared"
    ),
}


def measure_accuracy(*, resume: bool) -> None:
    """Every network, width and strategy, and the rivals.

    Args:
        resume: take what the results have already from there.
    """
    known = json.loads(_RESULTS.read_text()) if resume and _RESULTS.exists() else []
    rows = [row for name in NETWORKS for row in _measure(name, known)]
    table = Table(
        f"Right predictions, %; {CALIBRATION} calibration images, no training",
        ("network", "images", "numbers", "top-1 %", "to float", "file bytes", "of float", "s"),
    )
    for row in rows:
        table.add(
            row["network"],
            str(row["images"]),
            row["numbers"],
            f"{row['accuracy']:.2f}",
            f"{row['accuracy'] - row['float']:+.2f}",
            f"{row['bytes']:,}" if row["bytes"] else "",
            f"{row['bytes'] / row['float_bytes']:.3f}" if row["bytes"] else "",
            f"{row['seconds']:.0f}" if row["seconds"] else "",
        )
    save("fixed_accuracy", rows, [table])


def fixed_program(name: str, options: str, count: int = CALIBRATION) -> tuple[Program, float]:
    """A pretrained net in fixed point, and the seconds of choosing formats."""
    model = zoo.pretrained(name)
    program = shohin.capture(model, zoo.example_inputs(name, 2), name=name)
    folded = shohin.optimize(program, "fold-bn", drift=False).program
    batches = [(part,) for part in calibration_images(name, count).split(25)]
    began = time.monotonic()
    text = f"fixed-point{{{options}}}"
    result = shohin.optimize(folded, text, calibration=batches, drift=False)
    return result.program, time.monotonic() - began


def calibration_images(name: str, count: int = CALIBRATION) -> Tensor:
    """Images that are not evaluated, drawn with a fixed seed: the sets are sorted by class."""
    images, _ = zoo.calibration_set(name)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:count]]


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions, %."""
    with torch.inference_mode():
        found = torch.cat([module(part).argmax(1) for part in images.split(50)])
    return 100 * float((found == labels).float().mean())


def _measure(name: str, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    there = {row["numbers"]: row for row in known if row["network"] == name}
    images, labels = zoo.evaluation_set(name)
    model = zoo.pretrained(name)
    reference = accuracy(model, images, labels)
    size = _bytes(shohin.capture(model, zoo.example_inputs(name, 2), name=name))
    common = {"network": name, "images": len(labels), "float": reference, "float_bytes": size}

    def row(numbers: str, found: float, stored: int = 0, seconds: float = 0.0) -> dict[str, Any]:
        made = {"numbers": numbers, "accuracy": found, "bytes": stored, "seconds": seconds}
        print(name, numbers, round(found, 2), flush=True)
        return {**common, **made}

    rows = [row("float", reference, size)]
    choices = {
        f"{width} {strategy}": f"{text} strategy={strategy}"
        for width, text in WIDTHS.items()
        for strategy in ("dynamic", "static")
    }
    for numbers, options in {**choices, **EXTRAS}.items():
        if numbers in there:
            rows.append(there[numbers])
            continue
        program, seconds = fixed_program(name, options)
        found = accuracy(program.module, images, labels)
        rows.append(row(numbers, found, _bytes(program), seconds))
    for rival, make in RIVALS.items():
        if rival in there:
            rows.append(there[rival])
            continue
        run = make(model, calibration_images(name), 2)
        found = rival_accuracy(run, images, labels)
        rows.append(row(rival, found, getattr(run, "bytes", 0)))
    return rows


def _bytes(program: Program) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.shohin"
        shohin.ir.save_program(program, path)
        return path.stat().st_size
