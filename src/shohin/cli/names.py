"""Objects that users name: ``file.py:name`` and ``package.module:name``."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from shohin.cli.screen import user_line
from shohin.errors import ShohinError, SpecError, near_name_hint

_FORM = "write file.py:name or package.module:name"


def load_object(text: str, option: str) -> object:
    """The object of that name, its file or module imported at first use.

    The folder of a file, or the current one, is put on the import path, as Python does for a
    script.

    Args:
        text: ``file.py:name`` or ``package.module:name``; the name may have dots.
        option: what names it, for errors: ``--evaluate``.

    Raises:
        SpecError: when there is no such file, module or name, or importing it fails.
    """
    source, colon, name = text.rpartition(":")
    if not colon or not source or not name:
        raise SpecError(option, f"expected a name with a colon, got '{text}'", _FORM)
    module = _import_file(Path(source)) if source.endswith(".py") else _import_package(source)
    found: object = module
    for part in name.split("."):
        if not hasattr(found, part):
            known = tuple(item for item in vars(module) if not item.startswith("_"))
            raise SpecError(source, f"has no '{name}'", near_name_hint(name, known))
        found = getattr(found, part)
    return found


def call_object(found: object, text: str) -> object:
    """What a function without arguments gives.

    Raises:
        SpecError: when it raises, showing the line of the user's code.
    """
    if not callable(found):
        raise SpecError(text, f"expected a function without arguments, got {found!r:.60}")
    try:
        return found()
    except ShohinError:
        raise
    except Exception as error:
        raise _explain(text, "failed when it was called", error) from error


def load_callable(text: str, option: str) -> Callable[..., Any]:
    """The function of that name.

    Raises:
        SpecError: when there is none, or it cannot be called.
    """
    found = load_object(text, option)
    if not callable(found):
        problem = f"expected '{text}' to be a function, got {type(found).__name__}"
        raise SpecError(option, problem)
    return found


def _import_file(path: Path) -> ModuleType:
    file = path.resolve()
    if not file.is_file():
        raise SpecError(str(path), "there is no such file", _FORM)
    # Not the bare stem: a user's file may be called like a module of Python's.
    name = f"_shohin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SpecError(str(path), "cannot be imported as Python code")
    module = importlib.util.module_from_spec(spec)
    _extend_path(file.parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _explain(str(path), "failed when it was imported", error) from error
    return module


def _import_package(name: str) -> ModuleType:
    _extend_path(Path.cwd())
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            hint = f"is it a file? then write {name.replace('.', '/')}.py"
            raise SpecError(name, f"there is no module '{error.name}'", hint) from error
        raise _explain(name, "failed when it was imported", error) from error
    except Exception as error:
        raise _explain(name, "failed when it was imported", error) from error


def _extend_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _explain(where: str, problem: str, error: Exception) -> SpecError:
    line = user_line(error)
    text = f"{type(error).__name__}: {error}"
    return SpecError(where, f"{problem}: {text}", None, f"  {line}" if line else None)
