"""Speed of ternary layers and networks beside our own dense and int8 ones, and other runtimes."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tables import Table, save

_FIXED = "fixed-point"
_RATIO = "fixed-point{ternary=ratio}"
OURS: Mapping[str, tuple[str, str]] = {
    "float": ("", ""),
    "ternary": ("layer", ""),
    "int8": ("", _FIXED),
    "ternary int8": ("layer", _FIXED),
    "ternary int8 by ratio": ("layer", _RATIO),
    "ternary int8 by row": ("row", _FIXED),
}
"""What values ternary weights have, and what follows, by the name of what comes out.

By layer are the two values that trained layers have; by row is one for each output. By ratio, the
two are small integers times factors, which leaves room to add many products in 16 bits.
"""

_SKEW = 1.2
"""How much larger positive values are than negative ones, about as in trained layers."""

_FLUSHED = 1 << 28
"""Bytes that are read to take everything else out of the caches."""

CONVOLUTIONS = ((64, 56), (128, 28), (256, 14), (512, 7), (512, 4), (512, 2))
"""Channels, and pixels along a side."""

NETWORKS = ("resnet-20", "vgg-9", "alexnet")
RIVALS = ("onnxruntime", "openvino")


def measure_linear(rounds: int) -> None:
    """A fully connected layer of 4096 x 4096 at batch 1: from cache, and streamed from memory."""
    functions = _linear_functions()
    rows = []
    for where in ("cache", "memory"):
        times = _medians(functions, rounds, flushed=where == "memory")
        rows.append({"weights": where, "milliseconds": times})
        print(rows[-1], flush=True)
    names = [*functions]
    table = Table(
        "Fully connected, 4096 x 4096, batch 1, one thread: milliseconds, and x PyTorch",
        ("weights from", *names, *(f"x {name}" for name in OURS)),
    )
    for row in rows:
        times = row["milliseconds"]
        table.add(
            row["weights"],
            *(f"{times[name]:.3f}" for name in names),
            *(f"{times['torch'] / times[name]:.1f}" for name in OURS),
        )
    save("ternary_linear", rows, [table])


def measure_convolutions(rounds: int, budget: float) -> None:
    """3 x 3 convolutions of as many channels in as out, the layer alone."""
    rows = []
    for channels, size in CONVOLUTIONS:
        times = _convolution(channels, size, rounds, budget)
        rows.append({"channels": channels, "size": size, "milliseconds": times})
        print(rows[-1], flush=True)
    headings = (
        "layer", *OURS, "float / ternary", "int8 / ternary", "int8 / by ratio", "int8 / by row",
    )  # fmt: skip
    table = Table("3 x 3 convolutions, batch 1, one thread, milliseconds", headings)
    for row in rows:
        times = row["milliseconds"]
        table.add(
            f"{row['channels']} at {row['size']} x {row['size']}",
            *(f"{times[name]:.4f}" for name in OURS),
            f"{times['float'] / times['ternary']:.2f}",
            f"{times['int8'] / times['ternary int8']:.2f}",
            f"{times['int8'] / times['ternary int8 by ratio']:.2f}",
            f"{times['int8'] / times['ternary int8 by row']:.2f}",
        )
    save("ternary_convolutions", rows, [table])


def measure_networks(names: Sequence[str], rounds: int, budget: float) -> None:
    """Whole networks with random weights, rivals running them in float32 and int8."""
    rows = [_network(name, threads, rounds, budget) for name in names for threads in (1, 2)]
    columns = [*rows[0]["milliseconds"]]
    table = Table(
        "Milliseconds at batch 1",
        ("network", "threads", *columns, "int8 / ternary int8", "fastest rival / ternary int8"),
    )
    for row in rows:
        times = row["milliseconds"]
        rival = min(time for name, time in times.items() if name not in OURS)
        table.add(
            row["network"],
            str(row["threads"]),
            *(f"{times[name]:.3f}" for name in columns),
            f"{times['int8'] / times['ternary int8']:.2f}",
            f"{rival / times['ternary int8']:.2f}",
        )
    save("ternary_networks", rows, [table])


def variants(
    model: Any, images: Any, name: str, *, whole: bool = False
) -> Iterator[tuple[str, Any]]:
    """A network as each of `OURS`, folded, one after the other.

    Args:
        model: the network.
        images: to calibrate on.
        name: of the network.
        whole: whether the first and the last layer are ternary, too.
    """
    import shohin

    program = shohin.capture(model, (images[:2],), name=name)
    program = shohin.optimize(program, "drop-identity, fold-bn", drift=False).program
    for label, (scales, passes) in OURS.items():
        made = _ternary(program, scales, whole) if scales else program
        if passes:
            made = shohin.optimize(made, passes, calibration=[(images,)], drift=False).program
        yield label, made


def _ternary(program: Any, scales: str, whole: bool) -> Any:
    """A program whose weights are ternary at the threshold of Li and Liu (arXiv 1605.04711)."""
    import torch

    from shohin.ir.encodings import Dense
    from shohin.ir.program import Stage
    from shohin.ir.ternary import Ternary

    program = program.copy()
    weights = {n: w for n, w in program.module.named_parameters() if w.dim() > 1}
    names = [*weights] if whole else [*weights][1:-1]
    encodings = dict(program.encodings)
    for name in names:
        weight = weights[name].detach()
        sizes = weight.abs()
        codes = (weight.sign() * (sizes > 0.7 * sizes.mean())).to(torch.int8)
        if scales == "row":
            rows = (weight * codes).flatten(1).sum(1) / codes.flatten(1).abs().sum(1)
            made = Ternary(codes, Dense(torch.ones(2)), rows)
        else:
            size = float((weight * codes).sum() / codes.abs().sum())
            made = Ternary.of(codes, _SKEW * size, size / _SKEW, torch.float32)
        encodings[name] = made
        with torch.no_grad():
            weight.copy_(made.materialise())
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def _linear_functions() -> dict[str, Callable[[], float]]:
    """Functions that run the layer and give its milliseconds."""
    import torch
    from torch import nn

    import shohin

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()).eval()
    x = torch.randn(8, 4096)
    functions: dict[str, Callable[[], float]] = {}
    for label, program in variants(model, x, "linear", whole=True):
        binary = shohin.compile(program, "cpu{threads=1}")
        functions[label] = lambda binary=binary: layer_ms(binary, x[:1].numpy())

    def run_torch() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            model(x[:1])
        return 1e3 * (time.perf_counter() - began)

    return {**functions, "torch": run_torch}


def _medians(
    functions: Mapping[str, Callable[[], float]], rounds: int, *, flushed: bool
) -> dict[str, float]:
    """Median milliseconds, in turns; from the second call in a row, or from cold caches."""
    import numpy as np

    other = np.zeros(_FLUSHED, np.uint8)
    found: dict[str, list[float]] = {label: [] for label in functions}
    for _ in range(rounds):
        for label, function in functions.items():
            if flushed:
                other.max()
            else:
                function()
            found[label].append(function())
    return {label: statistics.median(times) for label, times in found.items()}


def _convolution(channels: int, size: int, rounds: int, budget: float) -> dict[str, float]:
    import torch
    from torch import nn

    import shohin
    from shohin import bench

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(2, channels, size, size).relu()
    functions: dict[str, Callable[[], object]] = {}
    kernel: dict[str, list[float]] = {}
    for label, program in variants(model, x, "convolution", whole=True):
        binary = shohin.compile(program, "cpu{threads=1}")
        found = kernel[label] = []
        functions[label] = lambda binary=binary, found=found: found.append(
            layer_ms(binary, x[:1].numpy())
        )
    torch.set_num_threads(1)
    bench.measure(functions, rounds, budget)
    return {label: sorted(found)[len(found) // 2] for label, found in kernel.items()}


def layer_ms(binary: Any, array: Any) -> float:
    """Milliseconds of the layers themselves, conversions of inputs and outputs left out."""
    steps = binary.profile([array], runs=1)
    macs = [step.macs for step in binary.info.steps]
    return float(sum(ms for (_, ms), count in zip(steps, macs, strict=True) if count))


def _network(name: str, threads: int, rounds: int, budget: float) -> dict[str, Any]:
    import torch
    from fixed_rivals import RIVALS as INTEGER_RIVALS

    import shohin
    from shohin import bench, zoo
    from shohin.rivals import make_rival

    torch.manual_seed(0)
    torch.set_num_threads(2)
    model = zoo.build(name).eval()
    images = torch.randn(8, *zoo.example_inputs(name, 1)[0].shape[1:])
    array = images[:1].numpy()
    functions: dict[str, Callable[[], object]] = {}
    sizes = {}
    for label, program in variants(model, images, name):
        binary = shohin.compile(program, f"cpu{{threads={threads}}}")
        functions[label] = lambda binary=binary: binary(array)
        sizes[label] = binary.constant_bytes
    for rival in RIVALS:
        functions[rival] = make_rival(rival, model, (images[:1],), threads).run
    for rival, make in INTEGER_RIVALS.items():
        run = make(model, images, threads)
        functions[rival] = lambda run=run: run(array)
    torch.set_num_threads(threads)
    timings = bench.measure(functions, rounds, budget)
    row = {
        "network": name,
        "threads": threads,
        "milliseconds": {label: timing.median for label, timing in timings.items()},
        "constant_bytes": sizes,
    }
    print(row, flush=True)
    return row
