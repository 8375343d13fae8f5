"""Ternary networks: accuracy, size, speed and memory.

    export SHOHIN_DATA=...
    python benchmarks/ternary.py train --networks resnet-20 --parts ternary    # takes hours
    python benchmarks/ternary.py accuracy    # test errors of what was trained

Results go to ``benchmarks/results/ternary_*``.
"""

import argparse
from collections.abc import Callable, Mapping

import ternary_accuracy
import torch


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--networks", default=",".join(ternary_accuracy.RECIPES), help="to train")
    parser.add_argument("--parts", default=",".join(ternary_accuracy.PARTS), help="to train")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PARTS[options.part](options)


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "train": lambda options: ternary_accuracy.train(
        options.networks.split(","), options.parts.split(",")
    ),
    "accuracy": lambda _: ternary_accuracy.summarise(),
}


if __name__ == "__main__":
    main()
