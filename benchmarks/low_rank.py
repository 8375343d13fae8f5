"""Low-rank splitting: errors, accuracy, speed, and what it takes.

    export SHOHIN_DATA=...
    python benchmarks/low_rank.py layers      # errors of VGG-16's layers by solver and speed-up
    python benchmarks/low_rank.py schedules   # schedules of the alternating solver
    python benchmarks/low_rank.py networks    # accuracy of VGG-9 over speed-up, scheme, solver
    python benchmarks/low_rank.py thin        # SqueezeNet and ResNet-20
    python benchmarks/low_rank.py tune        # VGG-9 trained afterwards
    python benchmarks/low_rank.py speed       # milliseconds against our own dense and rivals
    python benchmarks/low_rank.py scale       # time and memory on VGG-16

Results go to ``benchmarks/results/low_rank_*``.
"""

import argparse
from collections.abc import Callable, Mapping

import low_rank_layers
import low_rank_networks
import low_rank_scale
import low_rank_speed
import low_rank_tune
import torch


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--resume", action="store_true", help="keep rows that are there")
    parser.add_argument("--networks", default=",".join(low_rank_speed.SPLITS), help="of speed")
    parser.add_argument("--images", type=int, default=3000, help="of scale")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    PARTS[options.part](options)


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "layers": lambda _: low_rank_layers.measure_layers(),
    "schedules": lambda _: low_rank_layers.measure_schedules(),
    "networks": lambda options: low_rank_networks.measure_networks(resume=options.resume),
    "thin": lambda options: low_rank_networks.measure_thin(resume=options.resume),
    "tune": lambda _: low_rank_tune.measure_tuning(),
    "speed": lambda options: low_rank_speed.measure_speed(
        tuple(options.networks.split(",")), rounds=25, budget=10.0
    ),
    "scale": lambda options: low_rank_scale.measure_scale(options.images),
}


if __name__ == "__main__":
    main()
