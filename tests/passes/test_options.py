from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from shohin.passes.options import (
    changed_options,
    describe_type,
    option_defaults,
    option_types,
    read_value,
)
from shohin.spec import Source, parse_specs


@dataclass(frozen=True)
class Options:
    """Options of several kinds."""

    path: str
    rate: float = 0.5
    names: tuple[str, ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    derived: int = field(default=0, init=False)


def read(text: str, hint: Any) -> Any:
    source = Source(f"p{{x={text}}}", "test")
    (spec,) = parse_specs(source)
    return read_value(spec.options[0].value, hint, source, "x")


def test_fields_that_are_not_given_are_no_options() -> None:
    assert list(option_types(Options)) == ["path", "rate", "names", "table"]
    assert option_defaults(Options) == {"rate": 0.5, "names": (), "table": {}}


def test_only_changed_options_and_those_without_default_are_given() -> None:
    assert changed_options(Options("a")) == {"path": "a"}
    changed = changed_options(Options("a", rate=1, table={"b": 2}))
    assert list(changed.items()) == [("path", "a"), ("rate", 1.0), ("table", {"b": 2})]
    assert isinstance(changed["rate"], float)


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "int"),
        (bool, "true | false"),
        (str | None, "str | none"),
        (Literal["a", 2], "a | 2"),
        (tuple[int, ...], "[int]"),
        (tuple[int, float], "[int, float]"),
        (list[str], "[str]"),
        (Sequence[float], "[float]"),
        (dict[str, float], "{str: float}"),
        (Mapping[str, int | None], "{str: int | none}"),
    ],
)
def test_types_in_words(hint: Any, text: str) -> None:
    assert describe_type(hint) == text


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("5", str, "5"),
        ("none", str, "none"),
        ("none", str | None, None),
        ('"none"', str | None, "none"),
        ("1", str | int, 1),
        ('"1"', str | int, "1"),
        ("1", float | int, 1),
        ("-inf", float, -float("inf")),
        ("2", Literal[1, 2], 2),
        ("[1,[2]]", tuple[int, list[int]], (1, [2])),
        ("[]", Sequence[int], ()),
        ("{a: [x]}", Mapping[str, tuple[str, ...]], {"a": ("x",)}),
        ("[1]", int | tuple[int, ...], (1,)),
    ],
)
def test_reading(text: str, hint: Any, value: object) -> None:
    found = read(text, hint)
    assert found == value
    assert type(found) is type(value)
