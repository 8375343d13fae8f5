"""Measured choices on disk, so that a kernel is measured once on a machine."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import platformdirs

from shohin.backends.tvm import kernels
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.processor import Processor
from shohin.ir.files import atomic_path


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of the variants of a kernel.

    Attributes:
        milliseconds: time by the variant's tile, as text.
    """

    milliseconds: dict[str, float]


@dataclass(frozen=True)
class TuningCache:
    """One small file for every kernel shape and processor.

    Attributes:
        folder: where the files are.
    """

    folder: Path

    @classmethod
    def default(cls) -> "TuningCache":
        """The cache of this user."""
        return cls(Path(platformdirs.user_cache_dir("shohin")) / "tuning")

    def read(self, kernel: Kernel, target: Processor) -> Measurement | None:
        """What was measured, or None. An unreadable file counts as not there."""
        try:
            content = json.loads(self._path(kernel, target).read_text())
            return Measurement({str(k): float(v) for k, v in content["milliseconds"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, kernel: Kernel, target: Processor, measurement: Measurement) -> None:
        """Keep a measurement."""
        path = self._path(kernel, target)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "kernel": kernel.problem(),
            "processor": target.resolved(),
            "milliseconds": measurement.milliseconds,
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    def _path(self, kernel: Kernel, target: Processor) -> Path:
        text = f"{kernel.problem()} {target.resolved()}"
        return self.folder / templates_version() / f"{digest(text.encode())}.json"


@lru_cache(maxsize=1)
def templates_version() -> str:
    """Hash of the templates' source: measurements of other templates do not count."""
    return sources_version(Path(str(kernels.__file__)).parent)


def sources_version(folder: Path) -> str:
    """Hash of the Python files in a folder."""
    return digest(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))))


def digest(data: bytes) -> str:
    """A short hash, for names of files."""
    return hashlib.sha256(data).hexdigest()[:16]
