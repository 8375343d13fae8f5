"""How long each pass took."""

from dataclasses import dataclass

from rich.table import Table

from shohin.passes.instruments.base import Instrument, PassEnd, PipelineEvent
from shohin.passes.pipeline import format_pass


@dataclass(frozen=True)
class PassTime:
    """Wall time of one pass.

    Attributes:
        text: the pass' canonical text.
        seconds: wall time of copying, running and verifying, without instruments.
    """

    text: str
    seconds: float


class Timing(Instrument):
    """Records the wall time of each pass that ran in the last pipeline."""

    def __init__(self) -> None:
        self._times: list[PassTime] = []

    @property
    def times(self) -> tuple[PassTime, ...]:
        """The times, in order."""
        return tuple(self._times)

    @property
    def total(self) -> float:
        """Sum of all times in seconds."""
        return sum(time.seconds for time in self._times)

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Start anew."""
        self._times.clear()

    def after_pass(self, event: PassEnd) -> None:
        """Take down a time."""
        self._times.append(PassTime(format_pass(event.current), event.seconds))

    def table(self) -> Table:
        """The times and their shares as a table, the total last."""
        table = Table("pass", "seconds", "share", title="Pass times")
        for time in (*self._times, PassTime("total", self.total)):
            share = time.seconds / self.total if self.total else 0.0
            table.add_row(time.text, f"{time.seconds:.3f}", f"{100 * share:.1f} %")
        return table
