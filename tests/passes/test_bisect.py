from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import nn

from shohin.ir.capture import capture
from shohin.ir.program import Program, readers, set_tensor, tensor_of, weight_names
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.bisect import Check, accuracy_check, bisect, output_check
from shohin.passes.remarks import Outcome, Reason, Remark

BATCH = (torch.linspace(-1, 1, 12).reshape(3, 4),)


@cache
def _captured() -> Program:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.Tanh())]
    return capture(nn.Sequential(*layers).eval(), BATCH)


@pytest.fixture
def program() -> Program:
    return _captured().copy()


@dataclass(frozen=True, kw_only=True)
class Disturb(Pass):
    """Add a little to every weight, and a lot to some."""

    name: ClassVar[str] = "disturb"
    bad: tuple[str, ...] = ()
    obeys: bool = True

    def run(self, program: Program, context: Context) -> PassResult:
        for name in weight_names(program):
            reader = next(readers(program, name))
            if self.obeys and not context.allows(name):
                context.skipped(reader, Reason.EXCLUDED_BY_OPTION)
                continue
            amount = 0.1 if name in self.bad else 1e-7
            set_tensor(program.module, name, tensor_of(program.module, name) + amount)
            remark = Remark(self.name, name, f"at {name}", Outcome.CHANGED, "disturbed")
            context.remarks.append(remark)
        return PassResult(program, True)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("site", ["0.weight", "4.bias", "8.bias"])
def test_the_planted_pass_and_layer_are_found(program: Program, index: int, site: str) -> None:
    passes = [Disturb() for _ in range(5)]
    passes[index] = Disturb(bad=(site,))
    found = bisect(program, passes, Context(), output_check(program, BATCH, 1e-3))
    assert (found.index, found.culprit) == (index, f"disturb{{bad=[{site}]}}")
    assert (found.site, found.layer) == (site, f"at {site}")
    assert found.runs <= 1 + 3 + 2 + 4
    assert all(probe.broken == (probe.error > 1e-3) for probe in found.probes)


def test_the_first_of_several_bad_layers_is_found(program: Program) -> None:
    passes = [Disturb(), Disturb(bad=("6.bias", "2.weight", "8.weight"))]
    found = bisect(program, passes, Context(), output_check(program, BATCH, 1e-3))
    assert found.site == "2.weight"


def test_a_good_pipeline_has_no_culprit(program: Program) -> None:
    found = bisect(program, [Disturb()] * 3, Context(), output_check(program, BATCH, 1e-3))
    assert (found.culprit, found.index, found.site, found.runs) == (None, None, None, 1)
    assert str(found).startswith(
        "no pass of 'disturb, disturb, disturb' breaks the program; 1 runs\n"
    )


def test_a_pass_that_breaks_at_no_single_site(program: Program) -> None:
    passes = [Disturb(bad=("0.bias",), obeys=False)]
    found = bisect(program, passes, Context(), output_check(program, BATCH, 1e-3))
    assert (found.index, found.site) == (0, None)
    assert (
        "pass 'disturb{bad=[0.bias] obeys=false}' (1 of 1) breaks the program, at no single site"
        in (str(found))
    )


def test_a_loss_of_accuracy_is_found(program: Program) -> None:
    reference = program.copy()

    def closeness(module: nn.Module) -> float:
        with torch.no_grad():
            return -float((module(*BATCH) - reference.module(*BATCH)).abs().max())

    check = accuracy_check(program, closeness, drop=1e-3)
    passes = [Disturb(), Disturb(bad=("4.weight",)), Disturb()]
    found = bisect(program, passes, Context(), check)
    assert (found.index, found.site, found.check) == (1, "4.weight", "drop")


def test_nan_counts_as_broken() -> None:
    assert Check("error", lambda _: 0.0, 1.0).is_broken(float("nan"))
    assert not Check("error", lambda _: 0.0, 1.0).is_broken(1.0)


def test_the_callers_context_and_program_are_left_alone(program: Program) -> None:
    allowed = {"0.weight", "4.bias"}
    context = Context(site_filter=allowed.__contains__)
    before = tensor_of(program.module, "4.bias").detach().clone()
    passes = [Disturb(bad=("2.bias", "4.bias"))]
    found = bisect(program, passes, context, output_check(program, BATCH, 1e-3))
    assert found.site == "4.bias"
    assert context.remarks == []
    assert torch.equal(tensor_of(program.module, "4.bias"), before)


def test_the_text_shows_every_run(program: Program) -> None:
    passes = [Disturb(), Disturb(bad=("8.bias",))]
    found = bisect(program, passes, Context(), output_check(program, BATCH, 1e-3))
    lines = str(found).splitlines()
    assert lines[0] == (
        "pass 'disturb{bad=[8.bias]}' (2 of 2) breaks the program at '8.bias' "
        "(layer at 8.bias); "
        f"{found.runs} runs"
    )
    assert lines[1] == "largest absolute error, limit 0.001:"
    assert len(lines) == 2 + found.runs
    assert lines[2].endswith("broken  first 2 passes")
    assert lines[4].endswith("good    first 2 passes, its first 0 sites")
