"""The text form of pipelines and targets: parser, errors with a caret, canonical printer.

A *spec* is a name with options, ``prune{density=0.1 include=[conv1,conv2]}``; a pipeline is specs
separated by commas. Values are words, quoted strings (as in JSON), lists in brackets, and tables
``{conv1: 0.5, fc: 0.1}``. What a word means depends on the type it is read as; read without a
type, ``none``, ``true``, ``false`` and numbers mean themselves and any other word is a string.

Every error shows the text with a caret under the exact column.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, TypeAlias

from lark import Lark, Token, Transformer, UnexpectedCharacters, UnexpectedToken, v_args
from lark.tree import Meta

from shohin.errors import SpecError

Value: TypeAlias = bool | int | float | str | tuple["Value", ...] | dict[str, "Value"] | None

_WORD = re.compile(r"""[^\s{}\[\],=:"']+""")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?inf", re.IGNORECASE)
_CONSTANTS = MappingProxyType({"none": None, "true": True, "false": False})
_BRACKETS = MappingProxyType({"RBRACE": "LBRACE", "RSQB": "LSQB"})
_VALUE_STARTS = frozenset({"WORD", "QUOTED", "LBRACE", "LSQB"})
_SYMBOLS = MappingProxyType(
    {
        "LBRACE": "'{'",
        "RBRACE": "'}'",
        "RSQB": "']'",
        "EQUAL": "'='",
        "COLON": "':'",
        "COMMA": "','",
        "$END": "the end",
    }
)


@dataclass(frozen=True)
class Source:
    """A text that is being read, for errors that point into it.

    Attributes:
        text: the whole text.
        where: what it is, the first word of every error: ``pipeline`` or ``target``.
    """

    text: str
    where: str

    def error(self, column: int, problem: str, hint: str | None = None) -> SpecError:
        """An error that shows the text with a caret under a column.

        Args:
            column: offset in the text, 0 at its start.
            problem: what was expected and what was found.
            hint: what to do about it.
        """
        start = self.text.rfind("\n", 0, column) + 1
        line = self.text[start:].split("\n", 1)[0].replace("\t", " ")
        return SpecError(self.where, problem, hint, f"  {line}\n  {' ' * (column - start)}^")


@dataclass(frozen=True)
class Word:
    """A word, or a quoted string without its quotes, and where it was written."""

    text: str
    quoted: bool
    column: int


@dataclass(frozen=True)
class Listing:
    """A list in brackets, and where it was written."""

    items: tuple["Written", ...]
    column: int


@dataclass(frozen=True)
class Table:
    """A table in braces, and where it was written."""

    entries: tuple[tuple[Word, "Written"], ...]
    column: int


Written: TypeAlias = Word | Listing | Table


@dataclass(frozen=True)
class WrittenOption:
    """An option as it was written, and where its name was."""

    name: str
    value: Written
    column: int


@dataclass(frozen=True)
class WrittenSpec:
    """A name with options as it was written, and where the name was."""

    name: str
    options: tuple[WrittenOption, ...]
    column: int


def parse_spec(text: str, where: str = "target") -> tuple[str, dict[str, Value]]:
    """Read one name with options, each option taken as what it looks like.

    Args:
        text: e.g. ``cpu{arch=x86-64-v4 threads=2}``.
        where: what the text is, for errors.

    Raises:
        SpecError: showing the text with a caret, when it is not exactly one spec.
    """
    source = Source(text, where)
    first, *others = parse_specs(source)
    if others:
        raise source.error(others[0].column, f"expected one name, got a second, '{others[0].name}'")
    return first.name, {option.name: plain_value(option.value) for option in first.options}


def parse_specs(source: Source) -> tuple[WrittenSpec, ...]:
    """Read specs separated by commas, as they are written.

    Raises:
        SpecError: showing the text with a caret, on a syntax error, an option that is given
            twice, or an empty text.
    """
    if not source.text.strip():
        raise SpecError(source.where, "expected at least one name, got an empty text")
    _check_brackets(source)
    try:
        tree = _parser().parse(source.text)
    except UnexpectedToken as error:
        raise _unexpected(source, error) from error
    specs = _Builder().transform(tree)
    _check_duplicates(source, specs)
    return specs


def plain_value(written: Written) -> Value:
    """What a value means when no type says how to read it."""
    if isinstance(written, Listing):
        return tuple(plain_value(item) for item in written.items)
    if isinstance(written, Table):
        return {key.text: plain_value(value) for key, value in written.entries}
    return written.text if written.quoted else plain_word(written.text)


def plain_word(text: str) -> bool | int | float | str | None:
    """What an unquoted word means when no type says how to read it."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def format_spec(name: str, options: Mapping[str, Value]) -> str:
    """The canonical text of a name with options, in the order of the mapping."""
    texts = [f"{key}={format_value(value)}" for key, value in options.items()]
    return f"{name}{{{' '.join(texts)}}}" if texts else name


def format_value(value: Value | Sequence[Value] | Mapping[str, Value]) -> str:
    """The canonical text of a value: shortest floats, quotes only where needed, sorted tables."""
    if isinstance(value, str):
        return _format_text(value)
    if isinstance(value, Mapping):
        entries = (f"{_format_text(key)}: {format_value(value[key])}" for key in sorted(value))
        return f"{{{', '.join(entries)}}}"
    if isinstance(value, Sequence):
        return f"[{','.join(format_value(item) for item in value)}]"
    return repr(value) if type(value) in (int, float) else str(value).lower()


def _format_text(text: str) -> str:
    is_plain = _WORD.fullmatch(text) and isinstance(plain_word(text), str)
    return text if is_plain else json.dumps(text)


@cache
def _parser() -> Lark:
    grammar = files("shohin").joinpath("pipeline.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", maybe_placeholders=False, propagate_positions=True)


def _check_brackets(source: Source) -> None:
    stack: list[Token] = []
    for token in _tokens(source):
        if token.type in _BRACKETS.values():
            stack.append(token)
        elif token.type in _BRACKETS and stack and stack.pop().type != _BRACKETS[token.type]:
            return  # The parser says what it expected here.
    if stack:
        column = stack[-1].start_pos or 0
        raise source.error(column, f"'{stack[-1]}' is never closed")


def _tokens(source: Source) -> Iterator[Token]:
    try:
        yield from _parser().lex(source.text)
    except UnexpectedCharacters as error:
        problem, hint = "the string is not closed, or has an escape that JSON has not", None
        if error.char == "'":
            problem, hint = 'unexpected "\'"', "strings take double quotes"
        raise source.error(error.pos_in_stream or 0, problem, hint) from error


def _unexpected(source: Source, error: UnexpectedToken) -> SpecError:
    accepted, token = set(error.accepts or error.expected), error.token
    at_end = token.type == "$END"
    column = len(source.text.rstrip()) if at_end else error.pos_in_stream or 0
    problem = f"expected {_describe(accepted)}, got {'the end' if at_end else repr(str(token))}"
    return source.error(column, problem, _hint(accepted, token))


def _hint(accepted: set[str], token: Token) -> str | None:
    if token.type == "COMMA" and accepted == {"WORD", "RBRACE"}:
        return "options are separated by blanks"
    if token.type == "WORD" and "LBRACE" in accepted:
        return "names are separated by commas"
    return None


def _describe(accepted: set[str]) -> str:
    texts = [text for symbol, text in _SYMBOLS.items() if symbol in accepted]
    if accepted >= _VALUE_STARTS:
        texts = ["a value", *(text for text in texts if text != "'{'")]
    elif "QUOTED" in accepted:
        texts = ["a key", *texts]
    elif "WORD" in accepted:
        texts = ["an option" if "RBRACE" in accepted else "a name", *texts]
    return " or ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _check_duplicates(source: Source, specs: Sequence[WrittenSpec]) -> None:
    for options in (spec.options for spec in specs):
        _check_unique(source, "option", [(option.name, option.column) for option in options])
        for option in options:
            _check_keys(source, option.value)


def _check_keys(source: Source, written: Written) -> None:
    inner: Sequence[Written] = ()
    if isinstance(written, Table):
        _check_unique(source, "key", [(key.text, key.column) for key, _ in written.entries])
        inner = [value for _, value in written.entries]
    elif isinstance(written, Listing):
        inner = written.items
    for value in inner:
        _check_keys(source, value)


def _check_unique(source: Source, kind: str, names: Sequence[tuple[str, int]]) -> None:
    seen: set[str] = set()
    for name, column in names:
        if name in seen:
            raise source.error(column, f"{kind} '{name}' is given twice")
        seen.add(name)


@v_args(meta=True)
class _Builder(Transformer[Token, tuple[WrittenSpec, ...]]):
    def start(self, _: Meta, specs: list[WrittenSpec]) -> tuple[WrittenSpec, ...]:
        return tuple(specs)

    def item(self, meta: Meta, parts: list[Any]) -> WrittenSpec:
        name, *options = parts
        return WrittenSpec(str(name), tuple(options), meta.start_pos)

    def option(self, meta: Meta, parts: list[Any]) -> WrittenOption:
        name, value = parts
        return WrittenOption(str(name), value, meta.start_pos)

    def word(self, meta: Meta, parts: list[Token]) -> Word:
        quoted = parts[0].type == "QUOTED"
        text = json.loads(parts[0], strict=False) if quoted else str(parts[0])
        return Word(text, quoted, meta.start_pos)

    def listing(self, meta: Meta, items: list[Written]) -> Listing:
        return Listing(tuple(items), meta.start_pos)

    def table(self, meta: Meta, entries: list[tuple[Word, Written]]) -> Table:
        return Table(tuple(entries), meta.start_pos)

    def entry(self, _: Meta, parts: list[Any]) -> tuple[Word, Written]:
        key, value = parts
        return key, value
