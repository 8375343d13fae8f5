"""Speed of pruned layers and networks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tables import Table, save

RIVALS = ("onnxruntime", "openvino")
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
DENSITIES = (0.2, 0.1, 0.05)

HAN_ALEXNET = (0.84, 0.38, 0.35, 0.37, 0.37, 0.09, 0.09, 0.25)
HAN_VGG16 = (
    0.58, 0.22, 0.34, 0.36, 0.53, 0.24, 0.42, 0.32, 0.27, 0.34, 0.35, 0.29, 0.36, 0.04, 0.04, 0.23,
)  # fmt: skip
"""Shares kept, layer by layer: Han et al. 2015, tables 4 and 5."""


def measure_layers(rounds: int, budget: float) -> None:
    """One 3 x 3 convolution at several densities against the best dense one, one thread."""
    rows = [
        _measure_layer(channels, size, density, rounds, budget)
        for channels, size in LAYERS
        for density in DENSITIES
    ]
    headings = ("layer", "density", "sparse ms", "with layout changes", "our dense", *RIVALS, "x")
    table = Table(
        "Pruned 3x3 convolutions, batch 1, one thread (ms); x is of kernels, layouts as they are "
        "inside of a network",
        headings,
    )
    for row in rows:
        table.add(
            row["layer"],
            f"{row['density']:g}",
            f"{row['sparse']:.4f}",
            f"{row['whole']:.4f}",
            f"{row['dense']:.4f}",
            *(f"{row['rivals'][name]:.4f}" for name in RIVALS),
            f"{row['speedup']:.2f}",
        )
    save("pruning_layers", rows, [table])


def _measure_layer(
    channels: int, size: int, density: float, rounds: int, budget: float
) -> dict[str, Any]:
    import torch
    from torch import nn

    import shohin
    from shohin import bench
    from shohin.rivals import make_rival

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Conv2d(channels, channels, 3, padding=1).eval()
    x = torch.randn(1, channels, size, size)
    program = shohin.capture(module, (x,))
    dense = shohin.compile(program, "cpu")
    pruned = shohin.optimize(program, f"prune{{density={density}}}", drift=False).program
    sparse = shohin.compile(pruned, "cpu")
    array = x.numpy()
    samples: dict[str, list[float]] = {"dense": [], "sparse": [], "whole": []}

    def profile_dense() -> None:
        samples["dense"].append(_milliseconds(dense, array, lambda kernel: "conv2d" in kernel))

    def profile_sparse() -> None:
        steps = sparse.profile([array], runs=1)
        kernels = [step.kernel for step in sparse.info.steps]
        times = [ms for _, ms in steps]
        samples["whole"].append(sum(times))
        samples["sparse"].append(
            sum(ms for ms, k in zip(times, kernels, strict=True) if "conv2d" in k)
        )

    functions: dict[str, Callable[[], object]] = {"dense": profile_dense, "sparse": profile_sparse}
    functions |= {name: make_rival(name, module, (x,), 1).run for name in RIVALS}
    timings = bench.measure(functions, rounds, budget)
    medians = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
    rivals = {name: timings[name].median for name in RIVALS}
    return {
        "layer": f"{channels} at {size}x{size}",
        "density": density,
        **medians,
        "rivals": rivals,
        "kernels": [step.kernel for step in sparse.info.steps],
        "speedup": min(medians["dense"], *rivals.values()) / medians["sparse"],
    }


def _milliseconds(binary: Any, array: Any, wanted: Callable[[str], bool]) -> float:
    steps = binary.profile([array], runs=1)
    kernels = [step.kernel for step in binary.info.steps]
    return sum(ms for (_, ms), kernel in zip(steps, kernels, strict=True) if wanted(kernel))


def measure_networks(rounds: int, budget: float) -> None:
    """AlexNet and VGG-16 at the densities of Han et al., random masks, batch 1."""
    chosen = {"alexnet": HAN_ALEXNET, "vgg-16": HAN_VGG16}
    rows = [
        _measure_network(name, densities, threads, rounds, budget)
        for name, densities in chosen.items()
        for threads in (1, 2)
    ]
    headings = ("network", "threads", "pruned ms", "our dense", *RIVALS, "x", "fc layers x")
    title = "Pruned networks with random masks, batch 1: speed only; x of the fastest dense one"
    table = Table(title, headings)
    for row in rows:
        times = row["milliseconds"]
        table.add(
            row["network"],
            str(row["threads"]),
            f"{times['pruned']:.2f}",
            f"{times['dense']:.2f}",
            *(f"{times[name]:.2f}" for name in RIVALS),
            f"{row['speedup']:.2f}",
            f"{row['fc_speedup']:.2f}",
        )
    save("pruning_networks", rows, [table])


def _measure_network(
    name: str, densities: Sequence[float], threads: int, rounds: int, budget: float
) -> dict[str, Any]:
    import torch

    import shohin
    from shohin import zoo
    from shohin.ir.program import weight_names

    torch.set_num_threads(threads)
    model, inputs = zoo.build(name), zoo.example_inputs(name, 1)
    program = shohin.capture(model, zoo.example_inputs(name, 2), name=name)
    program = shohin.optimize(program, "make-functional, drop-identity", drift=False).program
    weights = [w for w in weight_names(program) if w.endswith("weight")]
    kept = ", ".join(f"{w}: {d}" for w, d in zip(weights, densities, strict=True))
    pruned = shohin.optimize(program, f"prune{{densities={{{kept}}}}}", drift=False).program
    target = f"cpu{{threads={threads}}}"
    ours = {"dense": shohin.compile(program, target), "pruned": shohin.compile(pruned, target)}
    arrays = [tensor.numpy() for tensor in inputs]
    times = _medians(ours, model, inputs, threads, (rounds, budget))
    fc = {key: _fully_connected(binary, arrays) for key, binary in ours.items()}
    features = torch.randn(1, next(iter(model.classifier.parameters())).shape[1])
    fc |= _medians({}, model.classifier, (features,), threads, (rounds, budget))
    rival = min(times[rival] for rival in RIVALS)
    return {
        "network": name,
        "threads": threads,
        "milliseconds": times,
        "fully_connected": fc,
        "speedup": rival / times["pruned"],
        "fc_speedup": min(fc[key] for key in ("dense", *RIVALS)) / fc["pruned"],
        "steps": _steps(ours["pruned"], arrays),
    }


def measure_trained(programs: Mapping[str, Path], rounds: int, budget: float) -> None:
    """Networks that were pruned and retrained, beside what they were, batch 1.

    Args:
        programs: saved pruned programs, by name of their network in the zoo.
        rounds: of measuring.
        budget: seconds of measuring a row.
    """
    rows = [
        _measure_trained(name, path, threads, rounds, budget)
        for name, path in programs.items()
        for threads in (1, 2)
    ]
    headings = ("network", "threads", "pruned ms", "our dense", *RIVALS, "x dense", "x rivals")
    table = Table("Pruned and retrained networks, batch 1", headings)
    for row in rows:
        times = row["milliseconds"]
        table.add(
            row["network"],
            str(row["threads"]),
            *(f"{times[name]:.3f}" for name in ("pruned", "dense", *RIVALS)),
            f"{times['dense'] / times['pruned']:.2f}",
            f"{min(times[name] for name in RIVALS) / times['pruned']:.2f}",
        )
    save("pruning_trained", rows, [table])


def _measure_trained(
    name: str, path: Path, threads: int, rounds: int, budget: float
) -> dict[str, Any]:
    import torch

    import shohin
    from shohin import zoo

    torch.set_num_threads(threads)
    model, inputs = zoo.build(name), zoo.example_inputs(name, 1)
    program = shohin.capture(model, zoo.example_inputs(name, 2), name=name)
    programs = {"dense": program, "pruned": shohin.load(path)}
    passes = "make-functional, fold-bn, eliminate-dead"
    ours = {
        key: shohin.compile(
            shohin.optimize(one, passes, drift=False).program, f"cpu{{threads={threads}}}"
        )
        for key, one in programs.items()
    }
    arrays = [tensor.numpy() for tensor in inputs]
    times = _medians(ours, model, inputs, threads, (rounds, budget))
    return {
        "network": name,
        "threads": threads,
        "milliseconds": times,
        "steps": _steps(ours["pruned"], arrays),
    }


def _medians(
    ours: Mapping[str, Any], model: Any, inputs: Any, threads: int, limits: tuple[int, float]
) -> dict[str, float]:
    """Milliseconds of our binaries and of the rivals, in turns."""
    from shohin import bench
    from shohin.rivals import make_rival

    arrays = [tensor.numpy() for tensor in inputs]
    functions: dict[str, Callable[[], object]] = {
        key: (lambda binary=binary: binary(*arrays)) for key, binary in ours.items()
    }
    functions |= {rival: make_rival(rival, model, inputs, threads).run for rival in RIVALS}
    timings = bench.measure(functions, *limits)
    return {key: timing.median for key, timing in timings.items()}


def _fully_connected(binary: Any, arrays: Sequence[Any]) -> float:
    """Milliseconds of the fully connected layers."""
    steps = binary.profile(arrays, runs=15)
    return sum(ms for label, ms in steps if "linear" in label)


def _steps(binary: Any, arrays: Sequence[Any]) -> list[Mapping[str, Any]]:
    steps = binary.profile(arrays, runs=15)
    return [
        {"label": label, "kernel": info.kernel, "ms": round(ms, 5), "choice": info.note}
        for (label, ms), info in zip(steps, binary.info.steps, strict=True)
    ]
