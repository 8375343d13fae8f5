"""Prune a network of the zoo once and print what it took, as JSON; run by `pruning.py one-shot`.

Peak memory is counted while it prunes: the captured program, the pruned one, and whatever lies
beside them; not the user's model, which is dropped once it is captured. Needs Linux.
"""

import gc
import json
import re
import sys
import time
from pathlib import Path

import shohin
from shohin import zoo

_SELF = Path("/proc/self")


def _kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", (_SELF / "status").read_text())
    if found is None:
        raise RuntimeError(f"the system does not say {field}")
    return int(found[1])


def main() -> None:
    """Prune the network that is named on the command line."""
    name = sys.argv[1]
    shohin.optimize(shohin.capture(zoo.build("lenet-5"), zoo.example_inputs("lenet-5", 2)), "prune")
    imports = _kilobytes("VmRSS")
    program = shohin.capture(zoo.build(name), zoo.example_inputs(name, 2), name=name)
    gc.collect()
    parameters = [*program.module.parameters()]
    (_SELF / "clear_refs").write_text("5")  # Forgets the peak.
    began = time.monotonic()
    shohin.optimize(program, "prune{density=0.1}", drift=False)
    seconds = time.monotonic() - began
    peak = 1024 * (_kilobytes("VmHWM") - imports)
    bytes_of_model = sum(parameter.nbytes for parameter in parameters)
    row = {
        "network": name,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "seconds": seconds,
        "peak": peak,
        "imports": 1024 * imports,
        "model": bytes_of_model,
        "copies": peak / bytes_of_model,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
