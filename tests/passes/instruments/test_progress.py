import io
from collections.abc import Callable

import pytest
from rich.console import Console

from shohin.errors import PassError
from shohin.ir.program import Program
from shohin.passes.base import Context, Pass
from shohin.passes.instruments.progress import ProgressBar
from shohin.passes.manager import PassManager


def test_a_terminal_shows_the_passes(program: Program, shift: Callable[..., Pass]) -> None:
    screen, calls = io.StringIO(), []
    context = Context(progress=lambda *call: calls.append(call))
    bar = ProgressBar(Console(file=screen, force_terminal=True, width=80))
    callback = context.progress
    PassManager([shift(), shift()], [bar]).run(program, context)
    assert "shift" in screen.getvalue()
    assert "2/2" in screen.getvalue()
    assert calls == [(1, 2, "half")] * 2
    assert context.progress is callback


def test_a_file_shows_nothing(program: Program, shift: Callable[..., Pass]) -> None:
    screen, context = io.StringIO(), Context()
    callback = context.progress
    PassManager([shift()], [ProgressBar(Console(file=screen))]).run(program, context)
    assert screen.getvalue() == ""
    assert context.progress is callback


def test_a_failure_stops_drawing(program: Program, shift: Callable[..., Pass]) -> None:
    screen, context = io.StringIO(), Context()
    callback = context.progress
    console = Console(file=screen, force_terminal=True)
    with pytest.raises(PassError):
        PassManager([shift(fail=True)], [ProgressBar(console)]).run(program, context)
    assert context.progress is callback
    assert screen.getvalue().count("\x1b[?25h") == 1  # The cursor is shown again.
