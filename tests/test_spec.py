import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import SpecError
from shohin.spec import Source, Value, format_spec, parse_spec, parse_specs, plain_word

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from(["none", "true", "1", "1e5", "-inf", "a b", '"', "\\", "x=1", "\u2028"])
)
VALUES: st.SearchStrategy[Value] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_printing_and_parsing_gives_the_same_values(name: str, options: dict[str, Value]) -> None:
    read_name, read = parse_spec(format_spec(name, options))
    assert read_name == name
    assert list(read) == list(options)
    assert repr(_sorted(read)) == repr(_sorted(options))


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=4))
def test_canonical_text_is_a_fixpoint(name: str, options: dict[str, Value]) -> None:
    text = format_spec(name, options)
    assert format_spec(*parse_spec(text)) == text


@given(st.text(alphabet='ab1 ,={}[]:"\\\n', max_size=20))
def test_any_text_parses_or_raises_with_a_caret_inside(text: str) -> None:
    try:
        parse_specs(Source(text, "pipeline"))
    except SpecError as error:
        lines = str(error).split("\n")
        assert not text.strip() or (lines[-1].strip() == "^" and len(lines[-1]) <= len(text) + 3)


def test_words_without_a_type() -> None:
    words = ["none", "true", "false", "4", "-4", "4.", "1e-3", "-inf", "4a", "x86-64-v4", "1_000"]
    expected = [None, True, False, 4, -4, 4.0, 0.001, -float("inf"), "4a", "x86-64-v4", "1_000"]
    assert [repr(plain_word(word)) for word in words] == [repr(value) for value in expected]


def test_a_target() -> None:
    assert parse_spec("cpu{arch=x86-64-v4 threads=2}") == (
        "cpu",
        {"arch": "x86-64-v4", "threads": 2},
    )


def test_canonical_text() -> None:
    options: dict[str, Value] = {
        "a": 0.1,
        "b": (1, "x"),
        "c": {"w": 1e-05, "b": None},
        "d": "two words",
        "e": "2",
        "f": True,
    }
    text = 'p{a=0.1 b=[1,x] c={b: none, w: 1e-05} d="two words" e="2" f=true}'
    assert format_spec("p", options) == text
    assert format_spec("p", {}) == "p"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "",
            "target: expected at least one name, got an empty text",
        ),
        (
            "cpu, cuda",
            """
            target: expected one name, got a second, 'cuda'
              cpu, cuda
                   ^
            """,
        ),
        (
            "cpu,",
            """
            target: expected a name, got the end
              cpu,
                  ^
            """,
        ),
        (
            "cpu cuda",
            """
            target: expected '{', ',' or the end, got 'cuda'; names are separated by commas
              cpu cuda
                  ^
            """,
        ),
        (
            "cpu{a=1, b=2}",
            """
            target: expected an option or '}', got ','; options are separated by blanks
              cpu{a=1, b=2}
                     ^
            """,
        ),
        (
            "cpu{a=1",
            """
            target: '{' is never closed
              cpu{a=1
                 ^
            """,
        ),
        (
            "cpu{a=[1, {b: 2}",
            """
            target: '[' is never closed
              cpu{a=[1, {b: 2}
                    ^
            """,
        ),
        (
            "cpu{a=[1}",
            """
            target: expected ']' or ',', got '}'
              cpu{a=[1}
                      ^
            """,
        ),
        (
            "cpu}",
            """
            target: expected '{', ',' or the end, got '}'
              cpu}
                 ^
            """,
        ),
        (
            "cpu{a=}",
            """
            target: expected a value, got '}'
              cpu{a=}
                    ^
            """,
        ),
        (
            "cpu{a}",
            """
            target: expected '=', got '}'
              cpu{a}
                   ^
            """,
        ),
        (
            "cpu{a={1}}",
            """
            target: expected ':', got '}'
              cpu{a={1}}
                      ^
            """,
        ),
        (
            "cpu{a={=}}",
            """
            target: expected a key or '}', got '='
              cpu{a={=}}
                     ^
            """,
        ),
        (
            "cpu{a='x'}",
            """
            target: unexpected "'"; strings take double quotes
              cpu{a='x'}
                    ^
            """,
        ),
        (
            'cpu{a="x}',
            """
            target: the string is not closed, or has an escape that JSON has not
              cpu{a="x}
                    ^
            """,
        ),
        (
            "cpu{a=1 b=2 a=3}",
            """
            target: option 'a' is given twice
              cpu{a=1 b=2 a=3}
                          ^
            """,
        ),
        (
            "cpu{a=[{x: 1, x: 2}]}",
            """
            target: key 'x' is given twice
              cpu{a=[{x: 1, x: 2}]}
                            ^
            """,
        ),
        (
            "cpu{\n\ta=1\n\ta=2}",
            """
            target: option 'a' is given twice
               a=2}
               ^
            """,
        ),
    ],
)
def test_errors_point_at_the_column(text: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert str(caught.value) == _dedented(expected)


def _dedented(text: str) -> str:
    return re.sub(r"\n {12}", "\n", text).strip("\n ")


def _sorted(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return tuple(map(_sorted, value)) if isinstance(value, tuple) else value
