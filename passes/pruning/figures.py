"""Files of figures by name, so that an interrupted run need not find them again."""

import json
from collections.abc import Mapping
from pathlib import Path

from shohin.errors import ArtifactError
from shohin.ir.files import atomic_path


def read_figures(file: Path | None) -> dict[str, float] | None:
    """The figures that `write_figures` wrote; None without a file.

    Raises:
        ArtifactError: when the file is malformed.
    """
    if file is None or not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {str(name): float(figure) for name, figure in found.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ArtifactError(str(file), f"cannot be read: {error}", "remove it") from error


def write_figures(file: Path | None, figures: Mapping[str, float]) -> None:
    """Write figures by name, where there is a file to write to."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
