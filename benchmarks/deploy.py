"""Programs for other machines: their size, memory, exactness, and what they execute.

    export SHOHIN_DATA=...
    python benchmarks/deploy.py table                       # every model, form and target
    python benchmarks/deploy.py table --models lenet-5
    python benchmarks/deploy.py starts                      # memory and start, on this machine
    python benchmarks/deploy.py images                      # real images, emulated processors
    python benchmarks/deploy.py program --program net.shohin # size, and the same real images
    python benchmarks/deploy.py loops                       # static estimates of inner loops
    python benchmarks/deploy.py soak                        # a million runs in one process

Results go to ``benchmarks/results/deploy_*``. ARM is emulated: instructions are counted, times are
not taken. Needs gcc, qemu-aarch64 and qemu-arm, and for the loops llvm-mca.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deploy_loops
import deploy_soak
import numpy as np
import torch
from deploy_run import memory_and_start, run_program
from instructions import EMULATORS, instructions_per_run, missing
from tables import Table, save

import shohin
from shohin import zoo
from shohin.backends.registry import parse_target
from shohin.ir.program import Program

MODELS = ("lenet-5", "resnet-20", "squeezenet-1.1", "mobilenet-v2")
FORMS: Mapping[str, str] = {
    "dense": "",
    "pruned": "prune{density=0.1}",
    "shared": "prune{density=0.1}, share-weights{bits=5}",
    "fixed point": "fixed-point",
    "low-rank": "low-rank{speedup=1.5 solver=weights}",
    "ternary": "ternary-fit, fixed-point{ternary=ratio}",
}
"""What follows on the folding of normalisations, without training: accuracy is not compared."""

TARGETS = (
    "cpu{arch=x86-64-v3}",
    "arm{cpu=cortex-a72}",
    "arm{cpu=cortex-a76}",
    "armv7{cpu=cortex-a7}",
)
_CALIBRATION = 16
_IMAGES = 100


def measure_table(models: Sequence[str]) -> None:
    """File sizes, and what programs execute, for every model, form and target."""
    _need_emulators()
    rows = [row for model in models for row in _rows(model)]
    headings = (
        "model", "form", "target", "bytes", "x dense", "million instructions", "x dense",
        "difference",
    )  # fmt: skip
    table = Table("Programs of compressed weights", headings)
    dense = {(r["model"], r["target"]): r for r in rows if r["form"] == "dense"}
    for row in rows:
        beside = dense[row["model"], row["target"]]
        counts = row["instructions"], beside["instructions"]
        table.add(
            row["model"],
            row["form"],
            row["target"],
            f"{row['bytes']:,}",
            f"{beside['bytes'] / row['bytes']:.1f}",
            f"{counts[0] / 1e6:.2f}" if counts[0] else "",
            f"{counts[1] / counts[0]:.2f}" if counts[0] else "",
            "none" if row["difference"] == 0 else f"{row['difference']:.1e}",
        )
    save("deploy_table", rows, [table])


def _forms(name: str) -> Iterator[tuple[str, Program, torch.Tensor]]:
    """Every form of a model with random weights, and images."""
    torch.manual_seed(0)
    shape = zoo.example_inputs(name, 1)[0].shape[1:]
    images = torch.randn(_CALIBRATION, *shape)
    program = shohin.capture(zoo.build(name).eval(), (images[:2],), name=name)
    program = shohin.optimize(program, "drop-identity, fold-bn", drift=False).program
    for form, passes in FORMS.items():
        made = program
        if passes:
            batches = [(images,)]
            made = shohin.optimize(program, passes, calibration=batches, drift=False).program
        yield form, made, images


def _rows(name: str) -> Iterator[dict[str, Any]]:
    for form, program, images in _forms(name):
        for row in _targets(program, images[:1].numpy()):
            yield {"model": name, "form": form, **row}
            print(name, form, row, flush=True)


def _targets(program: Program, image: Any) -> Iterator[dict[str, Any]]:
    expected = None
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            kind = parse_target(target).kind
            binary = shohin.compile(program, target, weights="compressed")
            path = binary.save(Path(folder) / "net")
            found = run_program(path, kind, image)
            expected = found if expected is None else expected
            scale = float(np.abs(expected).max())
            yield {
                "target": target,
                "bytes": path.stat().st_size,
                "instructions": instructions_per_run(path, kind) if kind in EMULATORS else None,
                "difference": float(np.abs(found - expected).max()) / scale,
            }


def measure_program(source: Path) -> None:
    """Bytes of the programs of a trained LeNet-5, and what they see in real images."""
    _need_emulators()
    images, labels = zoo.evaluation_set("lenet-5", limit=10 * _IMAGES)
    program = shohin.load(source)
    rows, expected = [], None
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            binary = shohin.compile(program, target, weights="compressed")
            path = binary.save(Path(folder) / "net")
            found = run_program(path, parse_target(target).kind, images.numpy())
            size = path.stat().st_size
        expected = found if expected is None else expected
        row = {
            "target": target,
            "source": source.stat().st_size,
            "bytes": size,
            "weights": binary.info.weight_bytes,
            "right": int((found.argmax(1) == labels.numpy()).sum()),
            "alike": int((found.argmax(1) == expected.argmax(1)).sum()),
            "difference": float(np.abs(found - expected).max() / np.abs(expected).max()),
        }
        rows.append(row)
    table = Table(
        f"Static programs of {rows[0]['source']:,} bytes of network, on {len(labels)} images",
        ("target", "bytes", "weights in them", "right", "as on x86-64", "difference"),
    )
    for row in rows:
        numbers = (f"{row[key]:,}" for key in ("bytes", "weights", "right", "alike"))
        table.add(row["target"], *numbers, f"{row['difference']:.1e}")
    save("deploy_program", rows, [table])


def measure_loops() -> None:
    """Inner loops of ResNet-20 in every form."""
    if problem := deploy_loops.missing():
        raise SystemExit(f"deploy: {problem}")
    deploy_loops.measure_loops({form: program for form, program, _ in _forms("resnet-20")})


def measure_starts(models: Sequence[str]) -> None:
    """Peak memory, and time from start to end of a run, on this machine alone."""
    rows = []
    for model in models:
        for form, program, _ in _forms(model):
            with tempfile.TemporaryDirectory() as folder:
                binary = shohin.compile(program, weights="compressed")
                memory, start = memory_and_start(binary.save(Path(folder) / "net"))
            rows.append({"model": model, "form": form, "memory": memory, "start": start})
            print(rows[-1], flush=True)
    table = Table(
        "A run on zeros in a process of its own, weights decoded", ("model", "form", "MB", "ms")
    )
    for row in rows:
        table.add(row["model"], row["form"], f"{row['memory'] / 1e6:.1f}", f"{row['start']:.2f}")
    save("deploy_starts", rows, [table])


def compare_images() -> None:
    """What programs for ARM see in real images, beside what that for x86-64 does."""
    _need_emulators()
    name = "resnet-20-cifar10jpeg"
    images, labels = zoo.evaluation_set(name, limit=_IMAGES)
    program = shohin.capture(zoo.pretrained(name).eval(), (images[:2],), name="resnet-20")
    program = shohin.optimize(program, "drop-identity, fold-bn", drift=False).program
    table = Table(f"ResNet-20 on {_IMAGES} images", ("form", "target", "right", "as on x86-64"))
    rows = []
    for form, passes in (("float", ""), ("fixed point", "fixed-point")):
        made = program
        if passes:
            batches = [(images[:_CALIBRATION],)]
            made = shohin.optimize(program, passes, calibration=batches, drift=False).program
        expected = None
        for target in TARGETS:
            with tempfile.TemporaryDirectory() as folder:
                path = shohin.compile(made, target).save(Path(folder) / "net")
                scores = run_program(path, parse_target(target).kind, images.numpy())
            seen = scores.argmax(1)
            expected = seen if expected is None else expected
            row = {
                "form": form,
                "target": target,
                "right": int((seen == labels.numpy()).sum()),
                "alike": int((seen == expected).sum()),
            }
            rows.append(row)
            table.add(form, target, str(row["right"]), f"{row['alike']} of {_IMAGES}")
    save("deploy_images", rows, [table])


def _need_emulators() -> None:
    if problem := missing():
        raise SystemExit(f"deploy: {problem}")


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "table": lambda options: measure_table(options.models.split(",")),
    "starts": lambda options: measure_starts(options.models.split(",")),
    "images": lambda _: compare_images(),
    "program": lambda options: measure_program(options.program),
    "loops": lambda _: measure_loops(),
    "soak": lambda _: deploy_soak.measure_soak(),
}


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--program", type=Path, help="a trained LeNet-5")
    options = parser.parse_args()
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
