"""Where the published data sets and pretrained weights lie."""

import os
from pathlib import Path

from shohin.errors import SpecError

_VARIABLE = "SHOHIN_DATA"
_HINT = f"pass a folder or set the environment variable {_VARIABLE} to it"


def data_folder() -> Path | None:
    """The folder named by `SHOHIN_DATA`, else `../shared/data` beside the repository, if present.

    Where the variable is set, the default folder is not consulted.
    """
    named = os.environ.get(_VARIABLE)
    repository = Path(__file__).resolve().parents[3]
    folder = Path(named) if named else repository.parent / "shared" / "data"
    return folder if folder.is_dir() else None


def data_file(name: str, folder: Path | str | None = None) -> Path:
    """The path of a data file in `folder`, else in `data_folder()`.

    Raises:
        SpecError: The folder or the file is absent.
    """
    found = data_folder() if folder is None else Path(folder)
    if found is None:
        raise SpecError("data folder", "no folder with data sets and weights found", _HINT)
    if not (found / name).is_file():
        raise SpecError("data folder", f"{found} holds no file {name}", _HINT)
    return found / name
