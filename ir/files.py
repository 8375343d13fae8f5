"""Writing files so that a reader never meets half of one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from shohin.errors import ArtifactError


@contextmanager
def atomic_path(path: str | PathLike[str]) -> Iterator[Path]:
    """Hand out a temporary file that takes the place of `path` when the block succeeds.

    The temporary file lies in the same folder, so the replacement is one rename. When the block
    raises, the temporary file is removed and what was at `path` stays as it was.

    Args:
        path: the file to write; missing parent folders are an error.

    Yields:
        The temporary file, empty, with the suffix of `path`.

    Raises:
        ArtifactError: when the folder or the file cannot be written.
    """
    target = Path(path)
    try:
        temporary = _make_temporary(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise _unwritable(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it lies in, where they are missing.

    Raises:
        ArtifactError: when that cannot be done.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = "choose a folder that you may write to"
        raise ArtifactError(str(path), f"cannot be made: {reason}", hint) from error


def _make_temporary(target: Path) -> Path:
    if target.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(target))
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
    with tempfile.NamedTemporaryFile(
        dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix, delete=False
    ) as handle:
        temporary = Path(handle.name)
    temporary.chmod(mode)
    return temporary


def _unwritable(target: Path, error: OSError) -> ArtifactError:
    reason = (error.strerror or str(error)).lower()
    return ArtifactError(
        str(target),
        f"cannot be written: {reason}",
        "choose a folder that exists and that you may write to",
    )
