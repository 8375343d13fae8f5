"""Prints the program before and after passes."""

from collections.abc import Callable, Container

from shohin.ir.printer import format_program
from shohin.passes.instruments.base import Instrument, PassEnd, PassEvent
from shohin.passes.pipeline import format_pass


class EveryName(Container[str]):
    """Stands for the names of all passes."""

    def __contains__(self, name: object) -> bool:
        return True


ALL = EveryName()


class Printing(Instrument):
    """Prints the program around passes.

    Args:
        before: names of the passes before which to print, or `ALL`.
        after: names of the passes after which to print, or `ALL`.
        write: takes the texts; `print` by default.
    """

    def __init__(
        self,
        before: Container[str] = (),
        after: Container[str] = (),
        write: Callable[[str], object] = print,
    ) -> None:
        self._before = before
        self._after = after
        self._write = write

    def before_pass(self, event: PassEvent) -> None:
        """Print the program that a pass is given."""
        if event.current.name in self._before:
            self._write(f"# before {format_pass(event.current)}\n{format_program(event.program)}")

    def after_pass(self, event: PassEnd) -> None:
        """Print the program that a pass made."""
        if event.current.name in self._after:
            self._write(f"# after {format_pass(event.current)}\n{format_program(event.result)}")
