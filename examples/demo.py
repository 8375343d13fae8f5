"""From a PyTorch model to a small, fast binary, on handwritten digits, in under a minute.

Trains a small convolutional network, prunes it to the lowest density that costs little accuracy
on the validation images, compiles it, and compares PyTorch with the binary: accuracy, stored
bytes and milliseconds. Run it with ``make demo`` or ``python examples/demo.py [--out FOLDER]``.
"""

import argparse
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import shohin
from shohin.bench import interleaved
from shohin.ir import draw

SEED = 0
THREADS = 1
EPOCHS = 15
L1 = 1e-3  # pulls weights to zero, so that dropping the small ones costs little
DENSITIES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
TOLERANCE = 0.005  # validation accuracy that pruning may cost
CLEAN_UP = "drop-identity, fold-constants, fold-bn, eliminate-dead"


_Pair = tuple[Tensor, Tensor]
_Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    """Images `[count, 1, 8, 8]` of values from 0 to 1, and their classes `[count]`."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """Handwritten digits in three parts: to learn from, to choose by, and to judge by once."""

    train: Images
    validation: Images
    test: Images


def main() -> None:
    """Run the demonstration and write its files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write to")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    console = Console()

    digits = load_parts()
    model = make_model()
    started = time.perf_counter()
    train(model, digits.train)
    seconds = time.perf_counter() - started
    console.print(f"trained on {len(digits.train.labels)} images in {seconds:.1f} s")

    program = shohin.capture(model, digits.train.images[:2], name="net")
    result = optimise(program, digits.validation, console)
    # Tiles by the cost model rather than by measurement, so that the files are always the same.
    binary = shohin.compile(result.program, f"cpu{{threads={THREADS} tune=off}}")

    torch.save(model.state_dict(), out / "model.pt")
    result.save(out / "net.shohin")
    result.report.save(out / "report.json")
    result.report.save(out / "report.md")
    draw(result.program, out / "graph.svg")
    binary.save(out / "net.so")
    binary.save(out / "net")

    console.print(comparison(model, binary, digits.test, out))
    console.print(run_executable(out, digits.test))
    console.print(f"files in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def load_parts() -> Digits:
    """The digits of scikit-learn, split 60 : 20 : 20 with every class in proportion."""
    data, labels = load_digits(return_X_y=True)
    images = (data.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    rest, test = _split(torch.from_numpy(images), torch.from_numpy(labels), 0.2)
    learn, validation = _split(*rest, 0.25)
    return Digits(Images(*learn), Images(*validation), Images(*test))


def _split(images: Tensor, labels: Tensor, share: float) -> tuple[_Pair, _Pair]:
    first, second = train_test_split(
        range(len(labels)), test_size=share, random_state=SEED, stratify=labels
    )
    return (images[first], labels[first]), (images[second], labels[second])


def make_model() -> nn.Module:
    """Three convolutions with batch normalisation, and a classifier."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(64 * 2 * 2, 10),
    )


def train(model: nn.Module, part: Images) -> None:
    """Train in place with an L1 penalty; leaves the model in inference mode."""
    generator = torch.Generator().manual_seed(SEED)
    dataset = TensorDataset(part.images, part.labels)
    batches = DataLoader(dataset, batch_size=64, shuffle=True, generator=generator)
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    optimizer = torch.optim.Adam(model.parameters())
    steps = EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    model.train()
    for _ in range(EPOCHS):
        for images, labels in batches:
            optimizer.zero_grad()
            penalty = L1 * sum(weight.abs().sum() for weight in weights)
            loss = nn.functional.cross_entropy(model(images), labels) + penalty
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(model: _Classifier, part: Images) -> float:
    """Share of images that a model classifies rightly."""
    with torch.inference_mode():
        return float((model(part.images).argmax(1) == part.labels).float().mean())


def optimise(program: shohin.Program, part: Images, console: Console) -> shohin.Result:
    """Prune to the lowest density whose validation accuracy is close to that of the original."""

    def evaluate(module: nn.Module) -> float:
        return accuracy(module, part)

    wanted = evaluate(program.module) - TOLERANCE
    for density in (*DENSITIES, 1.0):
        passes = f"{CLEAN_UP}, prune{{density={density} scope=global}}"
        result = shohin.optimize(program, passes, evaluate=evaluate, seed=SEED)
        measured = result.report.evaluation
        if measured is not None and measured.after >= wanted:
            break
    console.print(f"density {density}, chosen on {len(part.labels)} validation images")
    return result


def comparison(model: nn.Module, binary: shohin.Artifact, test: Images, out: Path) -> Table:
    """PyTorch and the binary side by side; the only place that reads the test images' labels."""

    def run_all(images: Tensor) -> Tensor:
        (scores,) = binary.run_batches([images.numpy()])
        return torch.from_numpy(scores)

    before, after = accuracy(model, test), accuracy(run_all, test)
    stored, small, library, program = (
        (out / name).stat().st_size for name in ("model.pt", "net.shohin", "net.so", "net")
    )
    slow, fast = race(model, binary, test.images[:1])
    rows = [
        ("test accuracy", f"{before:.2%}", f"{after:.2%}", ""),
        ("weights on disk", f"{stored:,} bytes", f"{small:,} bytes", f"{stored / small:.1f} x"),
        ("shared library", "needs PyTorch", f"{library:,} bytes", ""),
        ("executable", "needs PyTorch", f"{program:,} bytes", ""),
        ("one image, 1 thread", f"{slow:.4f} ms", f"{fast:.4f} ms", f"{slow / fast:.1f} x"),
    ]
    table = Table(title=f"{len(test.labels)} test images")
    table.add_column()
    for head in ("PyTorch", "shohin", ""):
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def race(model: nn.Module, binary: shohin.Artifact, image: Tensor) -> tuple[float, float]:
    """Median milliseconds of the model and of the binary, measured in turns."""
    with torch.inference_mode():
        times = interleaved({"before": lambda: model(image), "after": lambda: binary(image)})
    return times["before"], times["after"]


def run_executable(out: Path, test: Images) -> str:
    """Run the standalone program on a file of one image; its output."""
    np.save(out / "image.npy", test.images[:1].numpy())
    command = [str((out / "net").resolve()), "image.npy", "--output", "scores.npy"]
    subprocess.run(command, cwd=out, check=True)
    scores = np.load(out / "scores.npy")
    return f"the executable reads image.npy and writes scores.npy: a {scores.argmax()}"


if __name__ == "__main__":
    main()
