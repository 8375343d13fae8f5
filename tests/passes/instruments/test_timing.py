import io
from collections.abc import Callable

import pytest
from rich.console import Console

from shohin.ir.program import Program
from shohin.passes.base import Context, Pass
from shohin.passes.instruments.timing import Timing
from shohin.passes.manager import PassManager


def test_each_pass_is_timed(program: Program, shift: Callable[..., Pass]) -> None:
    timing = Timing()
    manager = PassManager([shift(), shift(amount=1.0)], [timing])
    for _ in range(2):
        manager.run(program, Context())
        assert [time.text for time in timing.times] == ["shift", "shift{amount=1.0}"]
    assert all(time.seconds > 0 for time in timing.times)
    assert timing.total == pytest.approx(sum(time.seconds for time in timing.times))


def test_the_table_ends_with_the_total(program: Program, shift: Callable[..., Pass]) -> None:
    timing = Timing()
    PassManager([shift(amount=1.0)], [timing]).run(program, Context())
    console = Console(file=io.StringIO(), width=80)
    console.print(timing.table())
    assert isinstance(console.file, io.StringIO)
    rows = console.file.getvalue().splitlines()
    assert any("shift{amount=1.0}" in row for row in rows)
    assert "total" in rows[-2]
    assert "100.0 %" in rows[-2]


def test_nothing_timed_is_a_table_too() -> None:
    assert Timing().table().row_count == 1
