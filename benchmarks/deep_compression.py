"""Deep Compression: one small file, and a binary that carries its weights compressed.

    SHOHIN_DATA=... python benchmarks/deep_compression.py train --networks vgg-9,resnet-20
    python benchmarks/deep_compression.py networks    # the tables of what was trained
    SHOHIN_DATA=... python benchmarks/deep_compression.py squeezenet  # without training
    python benchmarks/deep_compression.py alexnet     # seconds and bytes, random weights
    python benchmarks/deep_compression.py clusters    # k-means of 61 million numbers
    python benchmarks/deep_compression.py executable  # LeNet-5: bytes, and time to start

``train`` goes on from the pruned networks of ``pruning.py train``; without ``--test`` the test
images are not read. Sizes are those of files, every byte counted. Results go to
``benchmarks/results/compression_*.json`` and ``.md``.
"""

import argparse

import compression_networks
import compression_speed
import compression_squeezenet
import torch
from compression_recipes import COMPRESSIONS

_EXECUTABLE = "lenet-5 smallest"


def _train(options: argparse.Namespace) -> None:
    seeds = [int(seed) for seed in options.seeds.split(",")]
    compression_networks.measure(options.networks.split(","), seeds, test=options.test)


def _networks(_: argparse.Namespace) -> None:
    compression_networks.summarise()


def _squeezenet(_: argparse.Namespace) -> None:
    compression_squeezenet.measure_without_training()


def _alexnet(_: argparse.Namespace) -> None:
    compression_speed.measure_alexnet()


def _clusters(_: argparse.Namespace) -> None:
    compression_speed.measure_clusters()


def _executable(options: argparse.Namespace) -> None:
    seed = int(options.seeds.split(",")[0])
    compression_speed.measure_executable(compression_networks.file_path(_EXECUTABLE, seed))


PARTS = {
    "train": _train,
    "networks": _networks,
    "squeezenet": _squeezenet,
    "alexnet": _alexnet,
    "clusters": _clusters,
    "executable": _executable,
}


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--networks", default=",".join(COMPRESSIONS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--test", action="store_true", help="read the test images")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
