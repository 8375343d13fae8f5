"""Milliseconds of split networks beside our own dense ones and other runtimes running the dense."""

from collections.abc import Callable
from typing import Any

from tables import Table, save

PAPER_RANKS = (17, 37, 47, 83, 89, 106, 175, 192, 227, 398, 390, 379)
"""Of VGG-16's conv1_2 to conv5_3 at 4x (Zhang et al., arXiv 1505.06798, table 3)."""

SPLITS = {
    "vgg-9": {
        "channel 4x": "low-rank{speedup=4 compare=macs}",
        "3d 4x": "low-rank{speedup=4 scheme=3d exclude=[features.0.weight] compare=macs}",
    },
    "vgg-16": {"channel, the paper's ranks": "channel", "3d, the paper's ranks at 4x": "3d"},
    "squeezenet-1.1": {"channel 1.5x": "low-rank{speedup=1.5 compare=macs}"},
    "resnet-20": {"channel 1.5x": "low-rank{speedup=1.5 compare=macs}"},
}
RIVALS = ("onnxruntime", "openvino")


def measure_speed(names: tuple[str, ...], rounds: int, budget: float) -> None:
    """At batch 1, with one thread and with two; random weights, inputs and responses."""
    rows = [
        row
        for name in names
        for threads in (1, 2)
        for row in _measure(name, threads, rounds, budget)
    ]
    table = Table(
        "Milliseconds at batch 1; rivals run the network as it was",
        ("network", "threads", "split", "x MACs", "split", "dense", *RIVALS, "x dense", "x rival"),
    )
    for row in rows:
        times = row["milliseconds"]
        ours = times[row["split"]]
        table.add(
            row["network"],
            str(row["threads"]),
            row["split"],
            f"{row['speedup']:.2f}",
            f"{ours:.3f}",
            f"{times['dense']:.3f}",
            *(f"{times[rival]:.3f}" for rival in RIVALS),
            f"{times['dense'] / ours:.2f}",
            f"{min(times[rival] for rival in RIVALS) / ours:.2f}",
        )
    save("low_rank_speed", rows, [table])


def _measure(name: str, threads: int, rounds: int, budget: float) -> list[dict[str, Any]]:
    import torch

    import shohin
    from shohin import bench, zoo
    from shohin.rivals import make_rival

    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = zoo.build(name).eval()
    shape = zoo.example_inputs(name, 1)[0].shape[1:]
    images = torch.randn(2 if name == "vgg-16" else 64, *shape)
    program = shohin.capture(model, (images[:2],), name=name)
    dense = shohin.optimize(program, "drop-identity, fold-bn", drift=False).program
    results = {
        split: shohin.optimize(dense, _text(dense, text), calibration=[(images,)], drift=False)
        for split, text in SPLITS[name].items()
    }
    target = f"cpu{{threads={threads}}}"
    programs = {"dense": dense, **{split: one.program for split, one in results.items()}}
    binaries = {label: shohin.compile(one, target) for label, one in programs.items()}
    array = images[:1].numpy()
    functions: dict[str, Callable[[], object]] = {
        label: (lambda binary=binary: binary(array)) for label, binary in binaries.items()
    }
    for rival in RIVALS:
        functions[rival] = make_rival(rival, model, (images[:1],), threads).run
    torch.set_num_threads(threads)
    timings = bench.measure(functions, rounds, budget)
    times = {label: timing.median for label, timing in timings.items()}
    rows = [
        {
            "network": name,
            "threads": threads,
            "split": split,
            "speedup": one.report.before.macs / one.report.after.macs,
            "milliseconds": times,
        }
        for split, one in results.items()
    ]
    print(rows, flush=True)
    return rows


def _text(program: Any, text: str) -> str:
    return text if text.startswith("low-rank") else _paper(program, text)


def _paper(program: Any, scheme: str) -> str:
    """VGG-16's layers at the ranks of the paper, by singular values of random weights.

    They belong to its 3d form, which leaves the ``3 x 1`` to be chosen: here so that every layer
    has four times fewer operations.
    """
    weights = [item for item in program.module.named_parameters() if item[1].dim() == 4][1:]
    pairs = [*zip(weights, PAPER_RANKS, strict=True)]
    ranks = ", ".join(f"{name}: {rank}" for (name, _), rank in pairs)
    text = f"solver=weights compare=macs scheme={scheme} ranks={{{ranks}}}"
    if scheme == "3d":
        spatial = ", ".join(f"{name}: {_vertical(one, rank)}" for (name, one), rank in pairs)
        text += f" spatial_ranks={{{spatial}}}"
    return f"low-rank{{{text}}}"


def _vertical(weight: Any, rank: int) -> int:
    outputs, inputs = weight.shape[:2]
    left = weight.numel() / 4 - rank * outputs
    # The 1 x 3 can be no wider than three times what it is given.
    return max(-(-rank // 3), int(left / (3 * inputs + 3 * rank)))
