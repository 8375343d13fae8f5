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

import low_rank_layers
import torch


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = {
        "layers": low_rank_layers.measure_layers,
        "schedules": low_rank_layers.measure_schedules,
    }
    parser.add_argument("part", choices=parts)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts[options.part]()


if __name__ == "__main__":
    main()
