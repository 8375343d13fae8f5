from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import pytest
import torch
from torch import nn

from shohin.errors import PassError, SpecError, VerifyError
from shohin.ir.capture import capture
from shohin.ir.encodings import Dense
from shohin.ir.program import Fact, Program, set_tensor, tensor_of
from shohin.ir.serialise import content_hash
from shohin.passes import manager
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.instruments.base import (
    Instrument,
    PassEnd,
    PassEvent,
    PassFailure,
    PipelineEvent,
)
from shohin.passes.manager import PassManager, check_passes
from shohin.passes.remarks import Reason

aten = torch.ops.aten


@cache
def _captured() -> Program:
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (torch.ones(2, 3),))


@pytest.fixture
def program() -> Program:
    return _captured().copy()


@dataclass(frozen=True, kw_only=True)
class Scale(Pass):
    """Multiply the first weight."""

    name: ClassVar[str] = "scale"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})
    factor: float = 2.0

    def validate(self) -> None:
        if self.factor == 0:
            raise self.invalid_option("factor", "not 0")

    def run(self, program: Program, context: Context) -> PassResult:
        weight = tensor_of(program.module, "0.weight")
        set_tensor(program.module, "0.weight", weight * self.factor)
        context.changed(next(iter(program.graph.nodes)), "scaled")
        return PassResult(program, True)


@dataclass(frozen=True, kw_only=True)
class Look(Pass):
    """Change nothing; compute an analysis."""

    name: ClassVar[str] = "look"

    def run(self, program: Program, context: Context) -> PassResult:
        context.analyses.get(count_nodes, program)
        context.skipped(next(iter(program.graph.nodes)), Reason.TOO_SMALL)
        return PassResult(program, False)


@dataclass(frozen=True, kw_only=True)
class Needs(Look):
    """Require a fact and destroy it."""

    name: ClassVar[str] = "needs"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})


@dataclass(frozen=True, kw_only=True)
class Raise(Scale):
    """Change its copy in every way, then raise."""

    name: ClassVar[str] = "raise"
    error: ClassVar[type[BaseException]] = ValueError

    def run(self, program: Program, context: Context) -> PassResult:
        super().run(program, context)
        with torch.no_grad():
            tensor_of(program.module, "0.bias").fill_(7)
        for node in program.graph.nodes:
            node.meta["shohin"] = {}
        program.graph.erase_node(next(iter(reversed(program.graph.nodes))))
        raise self.error("no luck")


@dataclass(frozen=True, kw_only=True)
class Interrupt(Raise):
    """Be interrupted by the user."""

    name: ClassVar[str] = "interrupt"
    error: ClassVar[type[BaseException]] = KeyboardInterrupt


@dataclass(frozen=True, kw_only=True)
class Break(Scale):
    """Make an invalid program: an encoding that is not the weight."""

    name: ClassVar[str] = "break"

    def run(self, program: Program, context: Context) -> PassResult:
        encodings = {"0.weight": Dense(torch.zeros(3, 3))}
        return PassResult(replace(program, encodings=encodings), True)


def _reinterpret(program: Program) -> Program:
    weight = tensor_of(program.module, "0.weight")
    weight.data.view(torch.int32)[0, 0] += 1
    return program


def _rewire(program: Program) -> Program:
    relu = next(node for node in program.graph.nodes if node.target == aten.relu.default)
    relu.target = aten.sigmoid.default
    return program


def _append(program: Program) -> Program:
    *_, last, output = program.graph.nodes
    with program.graph.inserting_before(output):
        output.args = (program.graph.call_function(aten.relu.default, (last,)),)
    return program


def _encode(program: Program) -> Program:
    weight = tensor_of(program.module, "0.weight").detach()
    return replace(program, encodings={"0.weight": Dense(weight)})


def _add_buffer(program: Program) -> Program:
    set_tensor(program.module, "extra", torch.ones(1))
    return program


LIES: dict[str, tuple[Callable[[Program], Program], str]] = {
    "bit": (_reinterpret, "tensor '0.weight' differs"),
    "target": (_rewire, "node 'relu' differs"),
    "node": (_append, "node 'output' differs"),
    "encoding": (_encode, "the encodings differ"),
    "buffer": (_add_buffer, "tensor 'extra' was added or removed"),
}


@dataclass(frozen=True, kw_only=True)
class Lie(Pass):
    """Change something and deny it."""

    name: ClassVar[str] = "lie"
    kind: str = "bit"

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(LIES[self.kind][0](program), False)


@dataclass(frozen=True, kw_only=True)
class ReturnNothing(Pass):
    """Forget to return a result."""

    name: ClassVar[str] = "return-nothing"

    def run(self, program: Program, context: Context) -> PassResult:
        return None  # type: ignore[return-value]


@dataclass(frozen=True)
class Count:
    """Number of nodes."""

    nodes: int


def count_nodes(program: Program) -> Count:
    return Count(len(program.graph.nodes))


def test_passes_run_in_order_on_copies(program: Program) -> None:
    before = content_hash(program)
    weight = tensor_of(program.module, "0.weight").detach().clone()
    result = PassManager([Scale(), Look(), Scale(factor=-1.5)]).run(program, Context())
    assert torch.equal(tensor_of(result.module, "0.weight"), weight * -3)
    assert result.history == ("scale", "look", "scale{factor=-1.5}")
    assert result.facts == program.facts | {Fact.PRUNED}
    assert content_hash(program) == before


def test_facts_are_invalidated(program: Program) -> None:
    result = PassManager([Scale(), Needs()]).run(program, Context())
    assert result.facts == program.facts


def test_facts_of_the_program_count(program: Program) -> None:
    PassManager([Needs()]).run(replace(program, facts=frozenset({Fact.PRUNED})), Context())


def test_remarks_are_attributed_to_their_pass(program: Program) -> None:
    context = Context(pass_name="outer")
    PassManager([Scale(), Look()]).run(program, context)
    assert [(r.pass_name, r.reason) for r in context.remarks] == [
        ("scale", "scaled"),
        ("look", "too-small"),
    ]
    assert context.pass_name == "outer"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [Look(), Needs(), Scale()],
            "pass 'needs' (2 of 3): requires 'pruned', which does not hold there; "
            "put 'scale', which establishes it, before 'needs'",
        ),
        (
            [Needs()],
            "pass 'needs' (1 of 1): requires 'pruned', which does not hold there; "
            "add 'prune' before it",
        ),
        (
            [Scale(), Needs(), Needs()],
            "pass 'needs' (3 of 3): requires 'pruned', which does not hold there "
            "('needs' before it invalidates it); add 'prune' before it",
        ),
    ],
)
def test_an_impossible_order_is_refused_before_anything_runs(
    program: Program, passes: list[Pass], message: str
) -> None:
    context = Context()
    with pytest.raises(PassError) as caught:
        PassManager(passes).run(program, context)
    assert str(caught.value) == message
    assert context.remarks == []


def test_a_fact_that_no_pass_establishes(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "passes_establishing", lambda fact: ())
    with pytest.raises(PassError) as caught:
        PassManager([Needs()]).run(program, Context())
    assert str(caught.value) == (
        "pass 'needs' (1 of 1): requires 'pruned', which does not hold there; "
        "no known pass establishes it"
    )


def test_options_are_validated_before_anything_runs(program: Program) -> None:
    context = Context()
    with pytest.raises(SpecError) as caught:
        PassManager([Look(), Scale(factor=0.0)]).run(program, context)
    assert str(caught.value) == "option 'factor' of pass 'scale': expected not 0, got 0.0"
    assert context.remarks == []


def test_checking_alone_accepts_a_possible_order() -> None:
    check_passes([Scale(), Look(), Needs()])


def test_a_pass_that_raises_leaves_everything_as_it_was(program: Program) -> None:
    before, context = content_hash(program), Context()
    with pytest.raises(PassError) as caught:
        PassManager([Look(), Raise()]).run(program, context)
    assert str(caught.value) == (
        "pass 'raise' (2 of 2): raised ValueError: no luck; ran before it: look"
    )
    assert isinstance(caught.value.__cause__, ValueError)
    assert content_hash(program) == before
    assert [remark.pass_name for remark in context.remarks] == ["look"]
    assert context.analyses.names() == frozenset()
    assert context.pass_name == ""


def test_an_interruption_goes_through_as_it_is(program: Program) -> None:
    before, context = content_hash(program), Context()
    with pytest.raises(KeyboardInterrupt):
        PassManager([Interrupt()]).run(program, context)
    assert content_hash(program) == before
    assert context.remarks == []


def test_an_invalid_result_names_the_pass_and_its_cause(program: Program) -> None:
    before = content_hash(program)
    with pytest.raises(PassError) as caught:
        PassManager([Break()]).run(program, Context())
    assert str(caught.value).startswith("pass 'break' (1 of 1): gave an invalid program: ")
    assert str(caught.value).endswith("; it was the first to run")
    assert isinstance(caught.value.__cause__, VerifyError)
    assert content_hash(program) == before


def test_an_invalid_input_is_not_blamed_on_a_pass(program: Program) -> None:
    broken = Break().run(program, Context()).program
    with pytest.raises(VerifyError):
        PassManager([Look()]).run(broken, Context())


def test_without_verification_an_invalid_result_passes(program: Program) -> None:
    result = PassManager([Break(), Lie()], verify_each=False).run(program, Context())
    assert result.history == ("break", "lie")


@pytest.mark.parametrize("kind", LIES)
def test_a_pass_that_denies_its_change_is_caught(program: Program, kind: str) -> None:
    with pytest.raises(PassError) as caught:
        PassManager([Lie(kind=kind)]).run(program, Context())
    assert str(caught.value) == (
        "pass 'lie' (1 of 1): gave an invalid program: it was reported as not modified, "
        f"but {LIES[kind][1]}; it was the first to run"
    )


def test_a_pass_that_returns_no_result_is_caught(program: Program) -> None:
    with pytest.raises(PassError, match="raised TypeError: run returned NoneType, not PassResult"):
        PassManager([ReturnNothing()]).run(program, Context())


@dataclass(frozen=True, kw_only=True)
class Preserve(Scale):
    """Keep an analysis."""

    name: ClassVar[str] = "preserve"
    preserves_analyses: ClassVar[frozenset[str]] = frozenset({"count_nodes"})


@pytest.mark.parametrize(
    ("between", "computations"),
    [([], 1), ([Look()], 1), ([Preserve()], 1), ([Scale()], 2)],
)
def test_analyses_are_carried_over_where_they_stay_valid(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    between: list[Pass],
    computations: int,
) -> None:
    calls: list[Program] = []

    def counting(program: Program) -> Count:
        calls.append(program)
        return Count(len(program.graph.nodes))

    monkeypatch.setitem(globals(), "count_nodes", counting)
    counting.__name__ = "count_nodes"
    context = Context()
    result = PassManager([Look(), *between, Look()]).run(program, context)
    assert len(calls) == computations
    assert context.analyses.get(counting, result) == Count(len(program.graph.nodes))
    assert len(calls) == computations


class Log(Instrument):
    """Takes down every call."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.ends: list[PassEnd] = []

    def before_pipeline(self, event: PipelineEvent) -> None:
        self.lines.append(f"begin {len(event.program.history)}")

    def before_pass(self, event: PassEvent) -> None:
        self.lines.append(f"before {event.current.name} {len(event.program.history)}")

    def after_pass(self, event: PassEnd) -> None:
        self.lines.append(f"after {event.current.name} {event.modified} {len(event.remarks)}")
        self.ends.append(event)

    def on_error(self, event: PassFailure) -> None:
        remarks = len(event.remarks)
        self.lines.append(f"error {event.current.name} {type(event.error).__name__} {remarks}")

    def after_pipeline(self, event: PipelineEvent) -> None:
        self.lines.append(f"end {len(event.program.history)}")


def test_instruments_see_every_event(program: Program) -> None:
    log = Log()
    PassManager([Scale(), Look()], [log]).run(program, Context())
    assert log.lines == [
        "begin 0",
        "before scale 0",
        "after scale True 1",
        "before look 1",
        "after look False 1",
        "end 2",
    ]
    assert all(end.seconds > 0 for end in log.ends)
    assert log.ends[0].result is log.ends[1].program


def test_instruments_see_errors_and_nothing_after_them(program: Program) -> None:
    log = Log()
    with pytest.raises(PassError):
        PassManager([Look(), Raise(), Look()], [log]).run(program, Context())
    assert log.lines == [
        "begin 0",
        "before look 0",
        "after look False 1",
        "before raise 1",
        "error raise ValueError 1",
    ]


def test_no_passes_give_the_program_back(program: Program) -> None:
    assert PassManager([]).run(program, Context()) is program
