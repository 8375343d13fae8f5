"""Ternary networks: accuracy, size, speed and memory.

    export SHOHIN_DATA=...
    python benchmarks/ternary.py train --networks resnet-20 --winograd         # takes hours
    python benchmarks/ternary.py accuracy        # test errors of what was trained
    python benchmarks/ternary.py fit             # test errors without training
    python benchmarks/ternary.py files           # bytes of what was trained
    python benchmarks/ternary.py linear          # a fully connected layer against PyTorch
    python benchmarks/ternary.py convolutions    # against our own dense and int8
    python benchmarks/ternary.py speed           # whole networks against other runtimes
    python benchmarks/ternary.py memory          # resident set of AlexNet

Results go to ``benchmarks/results/ternary_*``.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping

import ternary_accuracy
import ternary_fit
import ternary_size
import ternary_speed
import torch
from winograd import use_winograd

_ROUNDS, _BUDGET = 25, 10.0


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--networks", help="to train, or to measure")
    parser.add_argument("--parts", default=",".join(ternary_accuracy.PARTS), help="to train")
    parser.add_argument("--winograd", action="store_true", help="train faster, on one thread")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.winograd:
        use_winograd()
    PARTS[options.part](options)


def _names(options: argparse.Namespace, known: Iterable[str]) -> list[str]:
    return options.networks.split(",") if options.networks else [*known]


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "train": lambda options: ternary_accuracy.train(
        _names(options, ternary_accuracy.RECIPES), options.parts.split(",")
    ),
    "accuracy": lambda _: ternary_accuracy.summarise(),
    "fit": lambda _: ternary_fit.measure_fits(),
    "files": lambda _: ternary_size.measure_files(),
    "memory": lambda _: ternary_size.measure_memory(),
    "linear": lambda _: ternary_speed.measure_linear(4 * _ROUNDS),
    "convolutions": lambda _: ternary_speed.measure_convolutions(_ROUNDS, _BUDGET),
    "speed": lambda options: ternary_speed.measure_networks(
        _names(options, ternary_speed.NETWORKS), _ROUNDS, _BUDGET
    ),
}


if __name__ == "__main__":
    main()
