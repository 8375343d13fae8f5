import json
from collections.abc import Callable
from pathlib import Path

import pytest

from shohin.errors import PassError
from shohin.ir.printer import format_program
from shohin.ir.program import Program
from shohin.passes.base import Context, Pass
from shohin.passes.instruments.dumping import Dumping
from shohin.passes.manager import PassManager
from shohin.passes.remarks import remarks_from_json


def test_every_step_is_written(
    program: Program, shift: Callable[..., Pass], tmp_path: Path
) -> None:
    folder, context = tmp_path / "a" / "b", Context()
    passes = [shift(), shift(amount=1.0)]
    result = PassManager(passes, [Dumping(folder)]).run(program, context)
    assert sorted(path.name for path in folder.iterdir()) == [
        "00-captured.txt",
        "01-shift.remarks.json",
        "01-shift.txt",
        "02-shift.remarks.json",
        "02-shift.txt",
    ]
    assert (folder / "00-captured.txt").read_text() == format_program(program) + "\n"
    assert (folder / "02-shift.txt").read_text() == format_program(result) + "\n"
    remarks = json.loads((folder / "02-shift.remarks.json").read_text())
    assert remarks_from_json(remarks) == context.remarks[1:]


def test_a_failure_is_written(program: Program, shift: Callable[..., Pass], tmp_path: Path) -> None:
    with pytest.raises(PassError):
        PassManager([shift(), shift(fail=True)], [Dumping(tmp_path)]).run(program, Context())
    assert (tmp_path / "02-shift.error.txt").read_text() == "ValueError: no luck\n"
    assert not (tmp_path / "02-shift.txt").exists()
