"""SqueezeNet 1.1 compressed without training: bytes of the file, and accuracy."""

import tempfile
import time
from pathlib import Path
from typing import Any

from pruning_obs import NETWORK, accuracy, calibration
from tables import Table, save

import shohin
from shohin import zoo

PIPELINES = {
    "5 bits": "share-weights{bits=5}, entropy-code",
    "5 bits, compensated": "share-weights{bits=5 compensate=true}, entropy-code",
    "bits by layer": "share-weights{target_bytes=740000}, entropy-code",
    "4 bits, compensated": "share-weights{bits=4 compensate=true}, entropy-code",
    "bits by layer, compensated": (
        "share-weights{target_bytes=600000 compensate=true}, entropy-code"
    ),
    "bits by layer, compensated, a tenth": (
        "share-weights{target_bytes=475000 compensate=true biases=8}, entropy-code"
    ),
}


def measure_without_training() -> None:
    """Share and code with 500 calibration images, and read the 500 evaluation images."""
    model = zoo.pretrained(NETWORK)
    before = accuracy(model)
    rows = [_measure(name, text, before) for name, text in PIPELINES.items()]
    headings = ("method", "bytes", "x", "top-1 %", "lost", "top-5 %", "lost", "seconds")
    table = Table(f"SqueezeNet 1.1 without training ({before[0]:.1f} % before)", headings)
    for row in rows:
        pairs = zip(before, row["accuracy"], strict=True)
        cells = [text for old, new in pairs for text in (f"{new:.1f}", f"{old - new:.1f}")]
        table.add(
            row["method"],
            f"{row['bytes']:,}",
            f"{row['ratio']:.2f}",
            *cells,
            f"{row['seconds']:.0f}",
        )
    save("compression_squeezenet", rows, [table])


def _measure(name: str, pipeline: str, before: tuple[float, float]) -> dict[str, Any]:
    model = zoo.pretrained(NETWORK)
    program = shohin.capture(model, zoo.example_inputs(NETWORK, 2), name=NETWORK)
    began = time.monotonic()
    result = shohin.optimize(program, pipeline, calibration=calibration(), drift=False)
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        size = result.save(Path(folder) / "net.shohin").stat().st_size
    single = 4 * sum(parameter.numel() for parameter in model.parameters())
    return {
        "method": name,
        "pipeline": pipeline,
        "bytes": size,
        "ratio": single / size,
        "before": before,
        "accuracy": accuracy(result.program.module),
        "seconds": seconds,
    }
