"""What the commands show: results on standard output, everything else on standard error."""

import json
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from shohin.errors import ShohinError, ShohinWarning
from shohin.tables import render

_WIDTH_OF_FILES = 120


def show(*parts: RenderableType) -> None:
    """Print to standard output, as wide as the terminal; 120 columns into files and pipes."""
    if not sys.stdout.isatty():
        sys.stdout.write(render(parts, _WIDTH_OF_FILES) + "\n")
        return
    console = Console(highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, (str, Text)), markup=False)


def show_json(described: Mapping[str, object]) -> None:
    """Print one JSON object to standard output."""
    sys.stdout.write(json.dumps(described, indent=2, allow_nan=False) + "\n")


def note(text: str) -> None:
    """Print a line to standard error."""
    _errors().print(text, soft_wrap=True, markup=False)


def print_error(error: ShohinError) -> None:
    """Print an error: where and what, the place where there is one, and the hint."""
    place = f"{error.where}: " if error.where else ""
    _print_labelled("error: ", "bold red", f"{place}{error.problem}")
    if error.excerpt:
        note(error.excerpt)
    if error.hint:
        _print_labelled("hint: ", "bold cyan", error.hint)


def print_failure(error: Exception) -> None:
    """Print an error that nobody foresaw, mostly one of the user's own code."""
    text = str(error).strip() or "no text"
    place = user_line(error)
    where = f"{place}\n" if place else ""
    _print_labelled("error: ", "bold red", f"{where}{type(error).__name__}: {text}")
    _print_labelled("hint: ", "bold cyan", "shohin --debug COMMAND shows the whole traceback")


def user_line(error: BaseException) -> str:
    """The last line of code outside of Python's and other people's packages, or nothing."""
    frames = traceback.extract_tb(error.__traceback__)
    own = Path(__file__).resolve().parents[1]
    libraries = ("site-packages", "dist-packages", str(Path(traceback.__file__).parent), "<")
    for frame in reversed(frames):
        file = frame.filename
        is_foreign = any(part in file for part in libraries)
        if not is_foreign and not Path(file).resolve().is_relative_to(own) and not _is_linked(file):
            return f"{file}:{frame.lineno}: {frame.line}"
    return ""


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print shohin's warnings as one line each."""
    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show_warning(message: Warning | str, category: type[Warning], *rest: object) -> None:
            if issubclass(category, ShohinWarning):
                _print_labelled("warning: ", "bold yellow", str(message))
            else:
                show_other(message, category, *rest)  # type: ignore[arg-type]

        warnings.showwarning = show_warning  # type: ignore[assignment]
        warnings.simplefilter("always", ShohinWarning)
        yield


def lines(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values in two columns."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown)


def _errors() -> Console:
    return Console(stderr=True, highlight=False)


def _print_labelled(label: str, style: str, text: str) -> None:
    _errors().print(Text.assemble((label, style), text), soft_wrap=True)


def _is_linked(file: str) -> bool:
    """Whether a file belongs to the parts of shohin that are links to other folders."""
    own = Path(__file__).resolve().parents[1]
    parts = [own / name for name in ("ir", "passes", "backends")]
    return any(Path(file).resolve().is_relative_to(part.resolve()) for part in parts)
