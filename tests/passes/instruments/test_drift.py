import io
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import Tensor

from shohin.ir.program import Program
from shohin.passes.base import Context, Pass
from shohin.passes.instruments.drift import Drift, Error, compare
from shohin.passes.manager import PassManager

BATCH = (torch.tensor([[1.0, 2.0], [-3.0, 0.5]]),)  # Outputs 1, 4, -3, 1.


def test_known_perturbations_give_known_errors(
    program: Program, shift: Callable[..., Pass]
) -> None:
    drift = Drift(BATCH)
    PassManager([shift(), shift(amount=1.0), shift(amount=0.25)], [drift]).run(program, Context())
    assert [(one.step, one.total) for one in drift.drifts] == [
        (Error(0.0, 0.0), Error(0.0, 0.0)),
        (Error(1.0, 1.0 / 4), Error(1.0, 1.0 / 4)),
        (Error(0.25, 0.25 / 5), Error(1.25, 1.25 / 4)),
    ]
    assert [one.text for one in drift.drifts] == [
        "shift",
        "shift{amount=1.0}",
        "shift{amount=0.25}",
    ]


def test_the_table_has_a_row_a_pass(program: Program, shift: Callable[..., Pass]) -> None:
    drift = Drift(BATCH)
    PassManager([shift(amount=1.0)], [drift]).run(program, Context())
    console = Console(file=io.StringIO(), width=100)
    console.print(drift.table())
    assert isinstance(console.file, io.StringIO)
    assert "shift{amount=1.0}" in console.file.getvalue()
    assert "0.25" in console.file.getvalue()


def test_a_program_that_cannot_run_on_noise_is_left_alone(
    program: Program, shift: Callable[..., Pass]
) -> None:
    wrong = (torch.zeros(3, 5),)
    drift = Drift(wrong, is_noise=True)
    PassManager([shift()], [drift]).run(program, Context())
    assert drift.drifts == ()
    with pytest.raises(RuntimeError):
        PassManager([shift()], [Drift(wrong)]).run(program, Context())


INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("reference", "other", "expected"),
    [
        ([[1.0, INF, NAN]], [[1.0, INF, NAN]], Error(0.0, 0.0)),
        ([[1.0, 2.0]], [[1.0, 2.5]], Error(0.5, 0.25)),
        ([[1.0], [100.0]], [[2.0], [150.0]], Error(50.0, 1.0)),
        ([[0.0]], [[1.0]], Error(1.0, INF)),
        ([[1.0, 2.0]], [[1.0, INF]], Error(INF, INF)),
        ([[1.0, 2.0]], [[1.0]], Error(INF, INF)),
        ([[1.0], [2.0]], [[1.0]], Error(INF, INF)),
        ([[]], [[]], Error(0.0, 0.0)),
        ([], [], Error(0.0, 0.0)),
    ],
)
def test_comparing(reference: list[list[float]], other: list[list[float]], expected: Error) -> None:
    assert compare(_tensors(reference), _tensors(other)) == expected


def test_a_nan_on_one_side_is_a_nan_error() -> None:
    error = compare(_tensors([[1.0, 2.0]]), _tensors([[1.0, NAN]]))
    assert math.isnan(error.absolute)
    assert math.isnan(error.relative)


def test_whole_numbers_are_compared_exactly() -> None:
    first, second = torch.tensor([2**31]), torch.tensor([2**31 + 1])
    assert compare([first], [second]).absolute == 1.0


def _tensors(values: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(value) for value in values]
