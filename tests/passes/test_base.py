from dataclasses import dataclass
from typing import ClassVar

from shohin.ir.program import Program
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.remarks import Outcome


@dataclass(frozen=True, kw_only=True)
class Toy(Pass):
    """Has two options."""

    name: ClassVar[str] = "toy"
    density: float = 2.0
    bits: int = 4

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program, False)


def test_without_a_filter_every_site_is_allowed() -> None:
    assert Context().allows("conv1")


def test_a_filter_decides_by_name() -> None:
    context = Context(site_filter={"conv1"}.__contains__)
    assert (context.allows("conv1"), context.allows("conv2")) == (True, False)


def test_an_invalid_option_is_named_with_its_value() -> None:
    error = Toy().invalid_option("density", "above 0 and at most 1")
    assert str(error) == "option 'density' of pass 'toy': expected above 0 and at most 1, got 2.0"


def test_options_are_the_fields() -> None:
    assert Toy.option_names() == ("density", "bits")
    Toy().validate()


def test_notes_are_on_the_program_as_a_whole() -> None:
    context = Context(pass_name="toy")
    context.noted("round", "round 1 of 2", evaluation=0.5)
    (note,) = context.remarks
    assert (note.pass_name, note.node, note.outcome) == ("toy", "", Outcome.NOTED)
    assert note.extra == {"evaluation": 0.5}


def test_most_passes_need_nothing_of_the_context() -> None:
    Toy().check_context(Context())
