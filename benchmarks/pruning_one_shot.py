"""Prune a network of the zoo once and print what it took, as JSON; run by `pruning.py one-shot`."""

import json
import resource
import sys
import time

import shohin
from shohin import zoo

_UNITS = 1 if sys.platform == "darwin" else 1024
"""Bytes of what the operating system counts memory in."""


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNITS


def main() -> None:
    """Prune the network that is named on the command line."""
    name = sys.argv[1]
    imports = _peak()
    model = zoo.build(name)
    bytes_of_model = sum(parameter.nbytes for parameter in model.parameters())
    program = shohin.capture(model, zoo.example_inputs(name, 2), name=name)
    began = time.monotonic()
    shohin.optimize(program, "prune{density=0.1}", drift=False)
    seconds = time.monotonic() - began
    peak = _peak()
    row = {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "peak": peak,
        "imports": imports,
        "model": bytes_of_model,
        "copies": (peak - imports) / bytes_of_model,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
