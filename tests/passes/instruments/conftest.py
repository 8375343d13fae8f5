"""What the tests of instruments share: a small program and passes that move its output."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from shohin.ir.capture import capture
from shohin.ir.program import Program, set_tensor, tensor_of
from shohin.passes.base import Context, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class Shift(Pass):
    """Add to the bias, which adds to the output."""

    name: ClassVar[str] = "shift"
    amount: float = 0.0
    fail: bool = False

    def run(self, program: Program, context: Context) -> PassResult:
        bias = tensor_of(program.module, "0.bias")
        set_tensor(program.module, "0.bias", bias + self.amount)
        context.changed(next(iter(program.graph.nodes)), "shifted", f"by {self.amount}")
        context.progress(1, 2, "half")
        if self.fail:
            raise ValueError("no luck")
        return PassResult(program, True)


@pytest.fixture
def shift() -> Callable[..., Pass]:
    """Makes passes that add an amount to the output."""
    return Shift


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shifts that really ran, in order."""
    seen: list[str] = []
    original = Shift.run

    def record(self: Shift, program: Program, context: Context) -> PassResult:
        seen.append(f"shift {self.amount} {context.seed}")
        return original(self, program, context)

    monkeypatch.setattr(Shift, "run", record)
    return seen


@pytest.fixture(scope="session")
def captured() -> Program:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        layer.bias.zero_()
    return capture(nn.Sequential(layer).eval(), (torch.ones(2, 2),))


@pytest.fixture
def program(captured: Program) -> Program:
    """``y = [[1, 0], [0, 2]] x``."""
    return captured.copy()
