"""Real images: what the binary predicts against what torch predicts, image by image.

    SHOHIN_DATA=... python benchmarks/accuracy.py

LeNets on all 10,000 MNIST test images, ResNet-20 and -32 on 761 lossless CIFAR-10 test images,
SqueezeNet 1.1 on 500 ImageNet-style images, from pretrained weights. Also builds the standalone
executable of ResNet-20 and runs it in an empty folder with an empty environment.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import shohin
from shohin import zoo

RESULTS = Path(__file__).parent / "results"
PASSES = "make-functional, fold-bn, eliminate-dead"
BATCHES = {
    "lenet-300-100": 100,
    "lenet-5": 100,
    "resnet-20": 1,
    "resnet-32": 1,
    "squeezenet-1.1": 1,
}


def _compile(name: str, batch: int) -> tuple[Any, Any]:
    model = zoo.pretrained(name)
    images, _ = zoo.evaluation_set(name, limit=2)
    program = shohin.optimize(shohin.capture(model, (images,), name=name), passes=PASSES).program
    return model, shohin.compile(program, target="cpu{threads=2}", batch=batch)


def _scores(run: Any, images: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([run(part) for part in images.split(batch)])


def measure(name: str) -> dict[str, Any]:
    """Accuracy of torch and of the binary, and how many images they disagree on."""
    batch = BATCHES[name]
    model, binary = _compile(name, batch)
    images, labels = zoo.evaluation_set(name)
    with torch.inference_mode():
        expected = _scores(model, images, batch)
    found = _scores(binary, images, batch)
    same = expected.argmax(1) == found.argmax(1)
    return {
        "model": name,
        "images": len(labels),
        "torch_correct": int((expected.argmax(1) == labels).sum()),
        "shohin_correct": int((found.argmax(1) == labels).sum()),
        "different_predictions": int((~same).sum()),
        "relative_error": float((found - expected).abs().max() / expected.abs().max()),
    }


def run_standalone() -> dict[str, Any]:
    """ResNet-20 as an executable, alone in a folder: what ldd says, and its digits."""
    model, binary = _compile("resnet-20", 1)
    image = zoo.evaluation_set("resnet-20", limit=1)[0]
    with tempfile.TemporaryDirectory() as folder:
        program = binary.save(Path(folder) / "resnet20")
        np.save(Path(folder) / "x.npy", image.numpy())
        ldd = shutil.which("ldd")
        linked = _run([ldd, str(program)], folder) if ldd else "ldd is not installed"
        printed = _run([str(program), "--output", "y.npy", "x.npy"], folder)
        timed = _run([str(program), "--benchmark", "200", "x.npy"], folder)
        digits = np.load(Path(folder) / "y.npy")
        size = program.stat().st_size
    with torch.inference_mode():
        expected = model(image).numpy()
    return {
        "ldd": linked.strip(),
        "printed": printed.strip(),
        "benchmark": timed.strip(),
        "bytes": size,
        "same_digits_as_library": bool((digits == binary(image).numpy()).all()),
        "relative_error_to_torch": float(abs(digits - expected).max() / abs(expected).max()),
    }


def _run(command: list[str], folder: str) -> str:
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", default=",".join(BATCHES))
    arguments = parser.parse_args()
    if zoo.data_folder() is None:
        raise SystemExit("set SHOHIN_DATA to the folder with the data sets and weights")
    table = Table(title="Accuracy on real images")
    for heading in ("model", "images", "torch", "binary", "different", "relative error"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = [measure(name) for name in arguments.models.split(",")]
    for row in rows:
        table.add_row(
            row["model"],
            str(row["images"]),
            f"{100 * row['torch_correct'] / row['images']:.2f} %",
            f"{100 * row['shohin_correct'] / row['images']:.2f} %",
            str(row["different_predictions"]),
            f"{row['relative_error']:.1e}",
        )
    standalone = run_standalone()
    Console(width=120).print(table)
    Console(width=120).print(standalone)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"accuracy": rows, "standalone": standalone}, indent=1)
    (RESULTS / "accuracy.json").write_text(text + "\n")
    raise SystemExit(any(row["different_predictions"] for row in rows))


if __name__ == "__main__":
    main()
