"""Errors of VGG-16's first seven convolutions, split by each solver, as they accumulate."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from tables import RESULTS, Table, save
from torch import Tensor, fx

import shohin
from shohin import zoo
from shohin.ir.program import Program
from shohin.passes.factoring.figures import draw_errors

SOLVERS = ("weights", "linear", "nonlinear", "asymmetric")
SPEEDUPS = (2, 3, 4, 5)
SCHEDULES: Mapping[str, str] = {
    "0.01 then 1, 25 each": "penalties=[0.01, 1] iterations=[25, 25]",
    "0.1 for 30, 1 for 20": "penalties=[0.1, 1] iterations=[30, 20]",
    "1 for 50": "penalties=[1] iterations=[50]",
    "0.1 for 50": "penalties=[0.1] iterations=[50]",
    "none: linear for split inputs": "penalties=[1] iterations=[0]",
}
_CALIBRATION, _HELD_OUT, _SIZE = 100, 50, 160
_MEANS = (103.939, 116.779, 123.68)


def measure_layers() -> None:
    """Relative errors after the ReLU on held-out images, by layer, speed-up and solver."""
    program, calibration, held_out = _setting()
    wanted = _responses(program.module, held_out)
    rows: list[dict[str, Any]] = []
    for speedup in SPEEDUPS:
        for solver in SOLVERS:
            rows.append(
                _measure(program, calibration, held_out, wanted, speedup, f"solver={solver}")
            )
            rows[-1] |= {"solver": solver}
            print(json.dumps(rows[-1]), flush=True)
    headings = ("speed-up", "solver", *rows[0]["errors"], "of all")
    table = Table(
        f"Squared error after the ReLU over squared responses, %, on {_HELD_OUT} held-out images; "
        "every layer is split and reads what those before it leave",
        headings,
    )
    for row in rows:
        errors = row["errors"].values()
        mean = sum(errors) / len(errors)
        cells = [f"{100 * error:.2f}" for error in (*errors, mean)]
        table.add(f"{row['speedup']}x", row["solver"], *cells)
    save("low_rank_layers", rows, [table])
    lines = {row["solver"]: row["errors"] for row in rows if row["speedup"] == 4}
    draw_errors(RESULTS / "low_rank_layers.png", lines)


def measure_schedules() -> None:
    """What schedules of the alternating solver come to at four times fewer operations."""
    program, calibration, held_out = _setting()
    wanted = _responses(program.module, held_out)
    rows = []
    for name, options in SCHEDULES.items():
        row = _measure(program, calibration, held_out, wanted, 4, f"solver=asymmetric {options}")
        rows.append({"schedule": name, **row})
        print(json.dumps(rows[-1]), flush=True)
    table = Table(
        "Asymmetric solver at 4x, penalties and iterations: errors as above, %",
        ("schedule", *rows[0]["errors"], "of all", "s"),
    )
    for row in rows:
        errors = row["errors"].values()
        cells = [f"{100 * error:.2f}" for error in (*errors, sum(errors) / len(errors))]
        table.add(row["schedule"], *cells, f"{row['seconds']:.0f}")
    save("low_rank_schedules", rows, [table])


def _setting() -> tuple[Program, list[tuple[Tensor]], Tensor]:
    """The network, calibration batches and held-out images, all from the calibration samples."""
    pixels, _ = zoo.datasets.imagenet("calib")
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    first = (pixels.shape[1] - _SIZE) // 2
    crop = pixels[order, first : first + _SIZE, first : first + _SIZE].flip(3)
    images = crop.permute(0, 3, 1, 2).float() - torch.tensor(_MEANS).reshape(3, 1, 1)
    model = zoo.vgg16_head_convs()
    program = shohin.capture(model, (images[:2],), name="vgg-16 head")
    program = shohin.optimize(program, "fold-bn", drift=False).program
    batches = [(part,) for part in images[:_CALIBRATION].split(10)]
    return program, batches, images[_CALIBRATION : _CALIBRATION + _HELD_OUT]


def _measure(
    program: Program,
    calibration: list[tuple[Tensor]],
    held_out: Tensor,
    wanted: dict[str, Tensor],
    speedup: int,
    options: str,
) -> dict[str, Any]:
    ranks = ", ".join(f"{name}: {rank}" for name, rank in _ranks(program, speedup).items())
    text = f"low-rank{{{options} ranks={{{ranks}}} positions=100 compare=macs}}"
    result = shohin.optimize(program, text, calibration=calibration, drift=False)
    found = _responses(result.program.module, held_out)
    names = [name.removesuffix(".weight") for name in _ranks(program, speedup)]
    errors = {
        layer: float((wanted[node] - found[node]).square().sum() / wanted[node].square().sum())
        for layer, node in zip(names, wanted, strict=True)
    }
    return {"speedup": speedup, "errors": errors, "seconds": result.report.passes[0].seconds}


def _ranks(program: Program, speedup: int) -> dict[str, int]:
    """Ranks at which each layer has so many times fewer operations."""
    module = program.module
    weights = {name: one for name, one in module.named_parameters() if one.dim() == 4}
    return {
        name: max(1, int(one.numel() / speedup / (one[0].numel() + one.shape[0])))
        for name, one in weights.items()
    }


def _responses(module: fx.GraphModule, images: Tensor) -> dict[str, Tensor]:
    """What every ReLU gives for some images, by its node."""
    found: dict[str, list[Tensor]] = {}

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is torch.ops.aten.relu.default:
                found.setdefault(n.name, []).append(value)
            return value

    with torch.inference_mode():
        for part in images.split(10):
            Reader(module).run(part)
    return {name: torch.cat(parts) for name, parts in found.items()}
