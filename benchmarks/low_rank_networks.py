"""Accuracy of networks that were split, without training and with, beside Tucker decompositions."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tables import RESULTS, Table, save
from torch import Tensor, nn

import shohin
from shohin import zoo
from shohin.ir.program import Program

SPEEDUPS = (2, 3, 4, 5)
SCHEMES = ("channel", "spatial", "3d")
SOLVERS = ("weights", "linear", "nonlinear", "asymmetric")
THIN = {"resnet-20-cifar10jpeg": "resnet-20", "squeezenet-1.1": "squeezenet-1.1"}
_THIN_SPEEDUPS = (1.25, 1.5, 2)
_IMAGES = 1500


def measure_networks(*, resume: bool) -> None:
    """VGG-9 on its test images: every speed-up, scheme and solver, all chosen beforehand."""
    known = _known("low_rank_networks") if resume else []
    rows = [*_measure("vgg-9", _configurations(), known), *_rivals("vgg-9", known)]
    save("low_rank_networks", rows, [_curves(rows)])


def measure_thin(*, resume: bool) -> None:
    """Networks whose layers are thin already."""
    known = _known("low_rank_thin") if resume else []
    options = [
        (f"{scheme} {speedup}x", f"scheme={scheme} speedup={speedup}")
        for scheme in ("channel", "3d")
        for speedup in _THIN_SPEEDUPS
    ]
    rows = [row for name in THIN for row in _measure(name, options, known)]
    table = Table(
        "Thin networks, asymmetric, without training; right predictions, %",
        ("network", "split", "operations fewer", "top-1 %", "to dense"),
    )
    for row in rows:
        change = row["accuracy"] - row["dense"]
        table.add(
            THIN[row["network"]],
            row["split"],
            f"{row['speedup']:.2f}x",
            f"{row['accuracy']:.2f}",
            f"{change:+.2f}",
        )
    save("low_rank_thin", rows, [table])


def folded(name: str) -> Program:
    """A pretrained network with its normalisation folded."""
    model = zoo.pretrained(name)
    program = shohin.capture(model, zoo.example_inputs(THIN.get(name, name), 2), name=name)
    return shohin.optimize(program, "drop-identity, fold-bn", drift=False).program


def calibration(name: str, count: int = _IMAGES) -> list[tuple[Tensor]]:
    """Images that are not evaluated, drawn with a fixed seed: the sets are sorted by class."""
    images, _ = zoo.calibration_set(name)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return [(part,) for part in images[order[:count]].split(100)]


def accuracy(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions, %."""
    with torch.inference_mode():
        found = torch.cat([module(part).argmax(1) for part in images.split(100)])
    return 100 * float((found == labels).float().mean())


def _configurations() -> list[tuple[str, str]]:
    splits = [
        (f"{scheme} {solver} {speedup}x", f"scheme={scheme} solver={solver} speedup={speedup}")
        for scheme in SCHEMES
        for solver in SOLVERS
        for speedup in SPEEDUPS
    ]
    uniform = [
        (f"channel uniform {speedup}x", f"speedup={speedup} selection=uniform multiple=1")
        for speedup in SPEEDUPS
    ]
    fine = [(f"channel fine {speedup}x", f"speedup={speedup} multiple=1") for speedup in SPEEDUPS]
    return [*splits, *uniform, *fine]


def _measure(
    name: str, options: list[tuple[str, str]], known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    there = {row["split"]: row for row in known if row["network"] == name}
    images, labels = zoo.evaluation_set(name)
    program, batches = folded(name), calibration(name)
    dense = accuracy(program.module, images, labels)
    for split, text in options:
        if split not in there:
            began = time.monotonic()
            passes = f"low-rank{{{text} compare=macs}}"
            result = shohin.optimize(program, passes, calibration=batches, drift=False)
            there[split] = {
                "network": name,
                "split": split,
                "speedup": result.report.before.macs / result.report.after.macs,
                "dense": dense,
                "accuracy": accuracy(result.program.module, images, labels),
                "seconds": round(time.monotonic() - began),
            }
            print(json.dumps(there[split]), flush=True)
        yield there[split]


def _rivals(name: str, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Tucker decompositions of the weights by tensorly-torch, at the same operations."""
    there = {row["split"]: row for row in known if row["network"] == name}
    images, labels = zoo.evaluation_set(name)
    for speedup in SPEEDUPS:
        split = f"tensorly-torch Tucker {speedup}x"
        if split not in there:
            model = zoo.pretrained(name)
            dense = accuracy(model, images, labels)
            found = _decompose(model, speedup)
            there[split] = {
                "network": name,
                "split": split,
                "speedup": found,
                "dense": dense,
                "accuracy": accuracy(model, images, labels),
                "seconds": 0,
            }
            print(json.dumps(there[split]), flush=True)
        yield there[split]


def _decompose(model: nn.Module, speedup: float) -> float:
    """Decompose every convolution but the first, in place; gives the speed-up that was reached."""
    sizes = _sizes(model)
    total = sum(positions * conv.weight.numel() for conv, positions in sizes.items())
    linear = sum(one.weight.numel() for one in model.modules() if isinstance(one, nn.Linear))
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        spent = sum(_tucker_macs(conv, positions, share) for conv, positions in sizes.items())
        low, high = (share, high) if spent + linear <= (total + linear) / speedup else (low, share)
    spent = sum(_tucker_macs(conv, positions, low) for conv, positions in sizes.items())
    for conv in sizes:
        if conv.in_channels > _FEW:
            _replace(conv, low)
    return (total + linear) / (spent + linear)


_FEW = 4


def _ranks(conv: nn.Conv2d, share: float) -> tuple[int, int]:
    return max(1, int(share * conv.out_channels)), max(1, int(share * conv.in_channels))


def _tucker_macs(conv: nn.Conv2d, positions: int, share: float) -> int:
    if conv.in_channels <= _FEW:
        return positions * conv.weight.numel()
    outer, inner = _ranks(conv, share)
    taps = conv.weight[0, 0].numel()
    return positions * (conv.in_channels * inner + inner * outer * taps + outer * conv.out_channels)


def _replace(conv: nn.Conv2d, share: float) -> None:
    from tltorch import FactorizedConv

    outer, inner = _ranks(conv, share)
    made = FactorizedConv.from_conv(
        conv, rank=(outer, inner, *conv.kernel_size), factorization="tucker"
    )
    with torch.no_grad():
        conv.weight.copy_(made.weight.to_tensor())


def _sizes(model: nn.Module) -> dict[nn.Conv2d, int]:
    """The convolutions of a model that is given 32 x 32 pixels, and their output positions."""
    sizes: dict[nn.Conv2d, int] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            sizes[module] = output[0, 0].numel()

    hooks = [one.register_forward_hook(note) for one in model.modules()]
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return sizes


def _curves(rows: list[dict[str, Any]]) -> Table:
    dense = rows[0]["dense"]
    table = Table(
        f"VGG-9 on CIFAR-10-JPEG without training; {dense:.2f} % dense, change in points",
        ("split", *(f"{speedup}x" for speedup in SPEEDUPS)),
    )
    by_split: dict[str, dict[str, float]] = {}
    for row in rows:
        split, _, speedup = row["split"].rpartition(" ")
        by_split.setdefault(split, {})[speedup] = row["accuracy"] - row["dense"]
    for split, found in by_split.items():
        table.add(split, *(f"{found[f'{speedup}x']:+.2f}" for speedup in SPEEDUPS))
    _draw(by_split)
    return table


def _draw(by_split: dict[str, dict[str, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    styles = {"channel": "-", "spatial": ":", "3d": "--", "tensorly-torch": "-."}
    for split, found in by_split.items():
        points = [found[f"{speedup}x"] for speedup in SPEEDUPS]
        axes.plot(SPEEDUPS, points, styles[split.split()[0]], marker="o", label=split)
    axes.set_yscale("symlog", linthresh=5)
    axes.set_xticks(SPEEDUPS)
    axes.set_xlabel("times fewer multiply-accumulates")
    axes.set_ylabel("change of accuracy (points)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(RESULTS / "low_rank_networks.png", dpi=130)


def _known(name: str) -> list[dict[str, Any]]:
    path: Path = RESULTS / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found
