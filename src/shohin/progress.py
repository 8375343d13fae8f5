"""A progress bar for work in steps."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class StepProgress:
    """A progress bar on standard error; nothing where that is no terminal.

    Call it with (steps done, steps, what comes next).
    """

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bars = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bars.add_task("")

    def __enter__(self) -> "StepProgress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, done: int, total: int, label: str) -> None:
        """Show how far the work is."""
        self._bars.update(self._task, completed=done, total=total, description=label)
