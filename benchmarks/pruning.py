"""Pruned layers and networks on the clock.

    python benchmarks/pruning.py layers      # one 3x3 layer at densities 0.2, 0.1 and 0.05
    python benchmarks/pruning.py networks    # AlexNet and VGG-16 at the densities of Han et al.

Masks are random in both: they say how fast, not how accurate. Results go to
``benchmarks/results/pruning_*.json`` and ``.md``.
"""

import argparse

import pruning_speed

PARTS = {
    "layers": pruning_speed.measure_layers,
    "networks": pruning_speed.measure_networks,
}


def main() -> None:
    """Run parts of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of measuring a row")
    arguments = parser.parse_args()
    for part in arguments.parts:
        PARTS[part](arguments.rounds, arguments.budget)


if __name__ == "__main__":
    main()
