"""Pruned layers and networks: on the clock, and on real images.

    python benchmarks/pruning.py layers      # one 3x3 layer at densities 0.2, 0.1 and 0.05
    python benchmarks/pruning.py networks    # AlexNet and VGG-16 at the densities of Han et al.
    SHOHIN_DATA=... python benchmarks/pruning.py train --networks lenet-5,vgg-9 --seeds 0,1,2
    python benchmarks/pruning.py accuracy    # the table of what was trained
    python benchmarks/pruning.py trained     # its speed
    SHOHIN_DATA=... python benchmarks/pruning.py curves      # retrained or not, L1 or L2, rounds
    SHOHIN_DATA=... python benchmarks/pruning.py squeezenet  # without training
    python benchmarks/pruning.py one-shot    # seconds and memory for VGG-16

Masks are random in the first two: they say how fast, not how accurate. Results go to
``benchmarks/results/pruning_*.json`` and ``.md``.

Training takes hours. It can be interrupted and started again, and different networks and seeds
can run side by side (``--threads 1``). Without ``--test`` the test images are not read: choose on
the validation images, then add it.
"""

import argparse

import pruning_accuracy
import pruning_curves
import pruning_memory
import pruning_obs
import pruning_speed
import torch
from pruning_recipes import RECIPES

TRAINED = {"vgg-9": "5x", "resnet-20": "5x"}
"""Networks whose speed is measured once they are pruned, and the goal."""


def _layers(options: argparse.Namespace) -> None:
    pruning_speed.measure_layers(options.rounds, options.budget)


def _networks(options: argparse.Namespace) -> None:
    pruning_speed.measure_networks(options.rounds, options.budget)


def _train(options: argparse.Namespace) -> None:
    networks, goals = options.networks.split(","), options.goals.split(",")
    pruning_accuracy.measure(networks, goals, _seeds(options), test=options.test)


def _accuracy(options: argparse.Namespace) -> None:
    pruning_accuracy.summarise()


def _trained(options: argparse.Namespace) -> None:
    seed = _seeds(options)[0]
    paths = {
        name: pruning_accuracy.program_path(name, goal, seed) for name, goal in TRAINED.items()
    }
    pruning_speed.measure_trained(paths, options.rounds, options.budget)


def _curves(options: argparse.Namespace) -> None:
    pruning_curves.measure_curves(_seeds(options))


def _squeezenet(options: argparse.Namespace) -> None:
    pruning_obs.measure_without_training()


def _one_shot(options: argparse.Namespace) -> None:
    pruning_memory.measure_one_shot()


PARTS = {
    "layers": _layers,
    "networks": _networks,
    "train": _train,
    "accuracy": _accuracy,
    "trained": _trained,
    "curves": _curves,
    "squeezenet": _squeezenet,
    "one-shot": _one_shot,
}


def main() -> None:
    """Run one part of the benchmark."""
    options = _parse()
    torch.set_num_threads(options.threads)
    PARTS[options.part](options)


def _seeds(options: argparse.Namespace) -> list[int]:
    return [int(seed) for seed in options.seeds.split(",")]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of measuring a row")
    parser.add_argument("--networks", default=",".join(RECIPES))
    every = {goal: None for recipe in RECIPES.values() for goal in recipe.goals}
    parser.add_argument("--goals", default=",".join(every), help="of each network, where it has it")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, while training")
    parser.add_argument("--test", action="store_true", help="read the test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
