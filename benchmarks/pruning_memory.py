"""One-shot pruning of VGG-16 in a process of its own: seconds, and peak memory in copies of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tables import Table, save

NETWORK = "vgg-16"


def measure_one_shot() -> None:
    """Prune VGG-16 to a tenth, without retraining."""
    command = [sys.executable, str(Path(__file__).with_name("pruning_one_shot.py")), NETWORK]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    headings = ("network", "parameters", "seconds", "peak MB beside the libraries", "copies")
    table = Table("Pruning at once, without retraining", headings)
    table.add(
        row["network"],
        f"{row['parameters'] / 1e6:.1f} M",
        f"{row['seconds']:.1f}",
        f"{row['peak'] / 1e6:.0f}",
        f"{row['copies']:.2f}",
    )
    save("pruning_one_shot", [row], [table])
