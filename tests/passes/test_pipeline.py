import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import SpecError, near_name_hint
from shohin.ir.program import Program
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.pipeline import format_pass, format_pipeline, parse_pipeline


@dataclass(frozen=True, kw_only=True)
class Fold(Pass):
    """Takes no options."""

    name: ClassVar[str] = "fold-bn"

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program, False)


@dataclass(frozen=True, kw_only=True)
class Prune(Fold):
    """Takes options of every kind."""

    name: ClassVar[str] = "prune"
    density: float = 0.5
    solver: Literal["linear", "nonlinear"] = "linear"
    bits: int | None = None
    exact: bool = False
    label: str | None = None
    include: tuple[str, ...] = ()
    sizes: list[int] = field(default_factory=list)
    pair: tuple[int, float] = (1, 2.0)
    densities: dict[str, float] = field(default_factory=dict)
    mixed: int | str | bool = 0

    def validate(self) -> None:
        if not 0 < self.density <= 1:
            raise self.invalid_option("density", "above 0 and at most 1")
        if self.bits is not None and self.bits < 1:
            raise SpecError("prune", f"bits must be positive, got {self.bits}", "leave it out")


@dataclass(frozen=True, kw_only=True)
class Needy(Fold):
    """Has an option without a default."""

    name: ClassVar[str] = "needy"
    path: str


CLASSES: dict[str, type[Pass]] = {owner.name: owner for owner in (Fold, Prune, Needy)}


def lookup(name: str) -> type[Pass]:
    if name not in CLASSES:
        raise SpecError("passes", f"unknown pass '{name}'", near_name_hint(name, [*CLASSES]))
    return CLASSES[name]


TEXTS = st.text(max_size=6) | st.sampled_from(["none", "true", "1", "a.b", "x y", '"'])
FLOATS = st.floats(allow_nan=False)
PRUNES = st.builds(
    Prune,
    density=st.floats(0, 1, exclude_min=True),
    solver=st.sampled_from(["linear", "nonlinear"]),
    bits=st.none() | st.integers(1, 99),
    exact=st.booleans(),
    label=st.none() | TEXTS,
    include=st.lists(TEXTS, max_size=3).map(tuple),
    sizes=st.lists(st.integers(), max_size=3),
    pair=st.tuples(st.integers(), FLOATS),
    densities=st.dictionaries(TEXTS, FLOATS, max_size=3),
    mixed=st.integers() | TEXTS | st.booleans(),
)
PASSES = st.just(Fold()) | PRUNES | st.builds(Needy, path=TEXTS)


@given(st.lists(PASSES, min_size=1, max_size=3).map(tuple))
def test_parsing_the_printed_text_gives_equal_passes(passes: tuple[Pass, ...]) -> None:
    text = format_pipeline(passes)
    parsed = parse_pipeline(text, lookup)
    assert parsed == passes
    assert format_pipeline(parsed) == text


def test_only_options_that_differ_are_printed_in_field_order() -> None:
    passes = parse_pipeline(
        "fold-bn ,\n prune { include=[a, b] label=none density=0.10 densities={fc: 1, a: .5} }",
        lookup,
    )
    assert format_pipeline(passes) == (
        "fold-bn, prune{density=0.1 include=[a,b] densities={a: 0.5, fc: 1.0}}"
    )


def test_whole_numbers_in_a_float_option_print_as_floats() -> None:
    assert format_pass(Prune(density=1)) == "prune{density=1.0}"


def test_types_are_those_of_the_fields() -> None:
    (parsed,) = parse_pipeline('prune{label=5 sizes=[1,2] pair=[3,4] mixed="1"}', lookup)
    assert isinstance(parsed, Prune)
    assert (parsed.label, parsed.sizes, parsed.pair, parsed.mixed) == ("5", [1, 2], (3, 4.0), "1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "fold-bn, prune{densty=0.1}",
            """
            pipeline: unknown option 'densty' of pass 'prune'; \
did you mean 'density' or 'densities'?
              fold-bn, prune{densty=0.1}
                             ^
            """,
        ),
        (
            "fold-bn{density=0.1}",
            """
            pipeline: unknown option 'density' of pass 'fold-bn'; it has no options
              fold-bn{density=0.1}
                      ^
            """,
        ),
        (
            "fold-bn, fold-bm",
            """
            pipeline: unknown pass 'fold-bm'; did you mean 'fold-bn'?
              fold-bn, fold-bm
                       ^
            """,
        ),
        (
            "prune{density=2}",
            """
            pipeline: option 'density' of pass 'prune': expected above 0 and at most 1, got 2.0
              prune{density=2}
                            ^
            """,
        ),
        (
            "prune{density=1 bits=0}",
            """
            pipeline: prune: bits must be positive, got 0; leave it out
              prune{density=1 bits=0}
                                   ^
            """,
        ),
        (
            "prune{density=abc}",
            """
            pipeline: option 'density' of pass 'prune': expected float, got 'abc'
              prune{density=abc}
                            ^
            """,
        ),
        (
            'prune{density="1"}',
            """
            pipeline: option 'density' of pass 'prune': expected float, got '1'
              prune{density="1"}
                            ^
            """,
        ),
        (
            "prune{density=nan}",
            """
            pipeline: option 'density' of pass 'prune': expected float, got 'nan'
              prune{density=nan}
                            ^
            """,
        ),
        (
            "prune{bits=1.5}",
            """
            pipeline: option 'bits' of pass 'prune': expected int | none, got '1.5'
              prune{bits=1.5}
                         ^
            """,
        ),
        (
            "prune{exact=yes}",
            """
            pipeline: option 'exact' of pass 'prune': expected true | false, got 'yes'
              prune{exact=yes}
                          ^
            """,
        ),
        (
            "prune{solver=liner}",
            """
            pipeline: option 'solver' of pass 'prune': expected linear | nonlinear, got 'liner'; \
did you mean 'linear'?
              prune{solver=liner}
                           ^
            """,
        ),
        (
            "prune{include=conv1}",
            """
            pipeline: option 'include' of pass 'prune': expected [str], got 'conv1'; \
a list is written [conv1]
              prune{include=conv1}
                            ^
            """,
        ),
        (
            "prune{include=[a,{}]}",
            """
            pipeline: option 'include' of pass 'prune': expected str, got a table
              prune{include=[a,{}]}
                               ^
            """,
        ),
        (
            "prune{pair=[1]}",
            """
            pipeline: option 'pair' of pass 'prune': expected [int, float], got a list
              prune{pair=[1]}
                         ^
            """,
        ),
        (
            "prune{densities={a: 1, b: x}}",
            """
            pipeline: option 'densities' of pass 'prune': expected float, got 'x'
              prune{densities={a: 1, b: x}}
                                        ^
            """,
        ),
        (
            "needy",
            """
            pipeline: pass 'needy' needs option 'path'
              needy
              ^
            """,
        ),
        (
            "prune{bits=1 bits=2}",
            """
            pipeline: option 'bits' is given twice
              prune{bits=1 bits=2}
                           ^
            """,
        ),
        (
            "fold-bn, prune{density=0.1",
            """
            pipeline: '{' is never closed
              fold-bn, prune{density=0.1
                            ^
            """,
        ),
        (" ", "pipeline: expected at least one name, got an empty text"),
    ],
)
def test_errors_point_at_the_column(text: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_pipeline(text, lookup)
    assert str(caught.value) == re.sub(r"\n {12}", "\n", expected).strip("\n ")


def test_an_unsupported_option_type_is_the_authors_error() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Odd(Fold):
        name: ClassVar[str] = "odd"
        value: complex = 0j

    with pytest.raises(TypeError, match="complex"):
        parse_pipeline("odd{value=1}", lambda _: Odd)
