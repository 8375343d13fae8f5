"""Fixed point: accuracy, speed, and that integers are the same everywhere.

    SHOHIN_DATA=... python benchmarks/fixed_point.py accuracy  # the table of Qiu et al. 2016
    python benchmarks/fixed_point.py speed                     # against float and int8 rivals
    SHOHIN_DATA=... python benchmarks/fixed_point.py exact     # bit for bit, over real images

Results go to ``benchmarks/results/fixed_*.json`` and ``.md``.
"""

import argparse

import fixed_accuracy
import fixed_exact
import fixed_speed
import torch


def main() -> None:
    """Run one part of the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("accuracy", "speed", "exact"))
    parser.add_argument("--networks", default=",".join(fixed_speed.NETWORKS), help="of speed")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of measuring a row")
    parser.add_argument("--resume", action="store_true", help="keep rows that accuracy has")
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.part == "accuracy":
        fixed_accuracy.measure_accuracy(resume=options.resume)
    elif options.part == "speed":
        names = tuple(options.networks.split(","))
        fixed_speed.measure_speed(names, options.rounds, options.budget)
    else:
        fixed_exact.measure_exactness()


if __name__ == "__main__":
    main()
