"""Speed of fixed-point networks beside our own dense ones and the integers of other runtimes."""

from collections.abc import Callable
from typing import Any

from tables import Table, save

NETWORKS = ("resnet-20", "vgg-9", "vgg-16", "squeezenet-1.1", "resnet-50")
OURS = ("shohin int8", "shohin int8, 7-bit weights", "shohin float")
COLUMNS = (*OURS, "onnxruntime int8", "openvino int8")


def measure_speed(names: tuple[str, ...], rounds: int, budget: float) -> None:
    """Milliseconds at batch 1, with one thread and with two."""
    rows = [_measure(name, threads, rounds, budget) for name in names for threads in (1, 2)]
    headings = ("network", "threads", *COLUMNS, "float / int8", "fastest rival / int8", "bytes")
    table = Table("Milliseconds at batch 1, 8-bit data", headings)
    for row in rows:
        times = row["milliseconds"]
        ours = times["shohin int8"]
        rival = min(times[name] for name in COLUMNS if name not in OURS)
        table.add(
            row["network"],
            str(row["threads"]),
            *(f"{times[name]:.3f}" for name in COLUMNS),
            f"{times['shohin float'] / ours:.2f}",
            f"{rival / ours:.2f}",
            f"{row['constant_bytes'] / row['float_constant_bytes']:.3f}",
        )
    save("fixed_speed", rows, [table])


def _measure(name: str, threads: int, rounds: int, budget: float) -> dict[str, Any]:
    import torch
    from fixed_rivals import RIVALS

    import shohin
    from shohin import bench, zoo

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = zoo.build(name)
    images = torch.randn(8, *zoo.example_inputs(name, 1)[0].shape[1:])
    program = shohin.capture(model, (images[:2],), name=name)
    folded = shohin.optimize(program, "fold-bn", drift=False).program
    texts = ("fixed-point", "fixed-point{weights=7 fc_weights=7}")
    fixed = [
        shohin.optimize(folded, text, calibration=[(images,)], drift=False).program
        for text in texts
    ]
    target = f"cpu{{threads={threads}}}"
    programs = dict(zip(OURS, (*fixed, folded), strict=True))
    binaries = {label: shohin.compile(program, target) for label, program in programs.items()}
    array = images[:1].numpy()
    functions: dict[str, Callable[[], object]] = {
        label: (lambda binary=binary: binary(array)) for label, binary in binaries.items()
    }
    for label, make in RIVALS.items():
        run = make(model, images, threads)
        functions[label] = lambda run=run: run(array)
    torch.set_num_threads(threads)
    timings = bench.measure(functions, rounds, budget)
    row = {
        "network": name,
        "threads": threads,
        "milliseconds": {label: timing.median for label, timing in timings.items()},
        "quartiles": {label: [t.low, t.high] for label, t in timings.items()},
        "constant_bytes": binaries["shohin int8"].constant_bytes,
        "float_constant_bytes": 4 * sum(p.numel() for p in model.parameters()),
    }
    print(row, flush=True)
    return row
