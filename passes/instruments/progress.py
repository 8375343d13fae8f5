"""A progress bar in the terminal."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shohin.passes.base import Progress as ProgressCallback
from shohin.passes.instruments.base import (
    Instrument,
    PassEnd,
    PassEvent,
    PassFailure,
    PipelineEvent,
)


class ProgressBar(Instrument):
    """Shows which pass runs and how far it is; silent when the console is no terminal.

    While the pipeline runs, the context's progress callback moves the bar of the current pass; the
    callback that was there is called as well.

    Args:
        console: where to draw; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._callback: ProgressCallback | None = None

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Start drawing."""
        if not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
        self._bars.add_task("passes", total=len(event.passes), completed=event.done)
        self._callback = event.context.progress
        event.context.progress = self._report
        self._bars.start()

    def before_pass(self, event: PassEvent) -> None:
        """Show the pass' name and give it a bar of its own."""
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], description=event.current.name)
            self._bars.add_task("", total=None, visible=False)

    def after_pass(self, event: PassEnd) -> None:
        """Advance by one pass."""
        if self._bars is not None:
            self._bars.remove_task(self._bars.task_ids[-1])
            self._bars.advance(self._bars.task_ids[0])

    def on_error(self, event: PassFailure) -> None:
        """Stop drawing."""
        self._stop(event)

    def after_pipeline(self, event: PipelineEvent) -> None:
        """Stop drawing."""
        self._stop(event)

    def _report(self, done: int, total: int, label: str) -> None:
        if self._callback is not None:
            self._callback(done, total, label)
        if self._bars is not None:
            task = self._bars.task_ids[-1]
            self._bars.update(task, completed=done, total=total, description=label, visible=True)

    def _stop(self, event: PassEvent | PipelineEvent) -> None:
        if self._bars is None or self._callback is None:
            return
        self._bars.stop()
        event.context.progress = self._callback
        self._bars, self._callback = None, None
