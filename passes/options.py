"""Options of a pass, or of any dataclass, in text: reading by type, describing, printing.

The fields of the dataclass are the options; their type hints say how a value is read. Known are
``int``, ``float``, ``bool``, ``str``, ``Literal``, unions of known types and ``None``, tuples,
lists and sequences, and mappings with ``str`` keys.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, get_type_hints

from shohin.spec import Listing, Source, Table, Value, Word, Written, plain_word

_INTEGER = re.compile(r"[+-]?[0-9]+")
# A union tries its members in this order: what is most particular first.
_PARTICULAR_FIRST = (NoneType, bool, Literal, int, float)


class IsDataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


class _MismatchError(Exception):
    """A value is not of its type; says which part of it."""

    def __init__(self, written: Written, hint: Any) -> None:
        super().__init__(written, hint)
        self.written = written
        self.hint = hint


def option_types(owner: type[IsDataclass]) -> dict[str, Any]:
    """The type hint of every option of a dataclass, in field order."""
    hints = get_type_hints(owner)
    return {option.name: hints[option.name] for option in fields(owner) if option.init}


def option_defaults(owner: type[IsDataclass]) -> dict[str, Any]:
    """The default of every option that has one."""
    factories = {
        option.name: option.default_factory
        for option in fields(owner)
        if option.init and option.default_factory is not MISSING
    }
    constants = {
        option.name: option.default
        for option in fields(owner)
        if option.init and option.default is not MISSING
    }
    return constants | {name: make() for name, make in factories.items()}


def changed_options(instance: IsDataclass) -> dict[str, Value]:
    """The options of an instance that differ from their defaults, in field order.

    A whole number in an option of type ``float`` is given as a ``float``.
    """
    owner = type(instance)
    defaults = option_defaults(owner)
    values = {name: getattr(instance, name) for name in option_types(owner)}
    return {
        name: _as_declared(values[name], hint)
        for name, hint in option_types(owner).items()
        if name not in defaults or values[name] != defaults[name]
    }


def read_value(written: Written, hint: Any, source: Source, name: str) -> Any:
    """Read a value as a type.

    Args:
        written: the value in the text.
        hint: the type hint to read it as.
        source: the text, for errors.
        name: what the value is for errors, e.g. ``option 'density' of pass 'prune'``.

    Raises:
        SpecError: with a caret under the part that is not of its type.
    """
    try:
        return _read(written, hint)
    except _MismatchError as error:
        problem = f"{name}: expected {describe_type(error.hint)}, got {_quote(error.written)}"
        raise source.error(
            error.written.column, problem, _advice(error.written, error.hint)
        ) from error


def describe_type(hint: Any) -> str:
    """A type as people read it: ``float``, ``linear | nonlinear``, ``[str]``, ``{str: float}``."""
    arguments = get_args(hint)
    if _is_union(hint):
        return " | ".join(describe_type(member) for member in arguments)
    if get_origin(hint) is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if _is_mapping(hint):
        return f"{{{describe_type(arguments[0])}: {describe_type(arguments[1])}}}"
    if _is_sequence(hint):
        items = arguments[:1] if arguments[-1] is ... else arguments
        return f"[{', '.join(describe_type(item) for item in items)}]"
    names = {NoneType: "none", bool: "true | false"}
    return names.get(hint, str(hint.__name__))


def _read(written: Written, hint: Any) -> Any:
    if _is_union(hint):
        return _read_union(written, hint)
    if _is_sequence(hint):
        return _read_sequence(written, hint)
    if _is_mapping(hint):
        return _read_mapping(written, hint)
    if not isinstance(written, Word):
        raise _MismatchError(written, hint)
    if get_origin(hint) is Literal:
        return _read_literal(written, hint)
    return _reader(hint)(written)


def _reader(hint: Any) -> Callable[[Word], Any]:
    readers: dict[Any, Callable[[Word], Any]] = {
        str: lambda word: word.text,
        int: _read_integer,
        float: _read_float,
        bool: lambda word: _read_constant(word, bool),
        NoneType: lambda word: _read_constant(word, NoneType),
    }
    if hint not in readers:
        raise TypeError(f"an option of type {hint} has no text form")
    return readers[hint]


def _read_integer(word: Word) -> int:
    if word.quoted or not _INTEGER.fullmatch(word.text):
        raise _MismatchError(word, int)
    return int(word.text)


def _read_float(word: Word) -> float:
    value = None if word.quoted else plain_word(word.text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _MismatchError(word, float)
    return float(value)


def _read_constant(word: Word, hint: type) -> bool | None:
    value = word.text if word.quoted else plain_word(word.text)
    if isinstance(value, hint) and (value is None or isinstance(value, bool)):
        return value
    raise _MismatchError(word, hint)


def _read_literal(word: Word, hint: Any) -> Any:
    for choice in get_args(hint):
        if str(choice) == word.text and (isinstance(choice, str) or not word.quoted):
            return choice
    raise _MismatchError(word, hint)


def _read_union(written: Written, hint: Any) -> Any:
    members = sorted(get_args(hint), key=_particularity)
    deepest = _MismatchError(written, hint)
    for member in members:
        try:
            return _read(written, member)
        except _MismatchError as error:
            deepest = error if error.written is not written else deepest
    raise deepest


def _particularity(hint: Any) -> int:
    kind = get_origin(hint) or hint
    return _PARTICULAR_FIRST.index(kind) if kind in _PARTICULAR_FIRST else len(_PARTICULAR_FIRST)


def _read_sequence(written: Written, hint: Any) -> tuple[Any, ...] | list[Any]:
    arguments = get_args(hint)
    if not isinstance(written, Listing):
        raise _MismatchError(written, hint)
    is_open = get_origin(hint) is not tuple or arguments[-1] is ...
    types = arguments[:1] * len(written.items) if is_open else arguments
    if len(types) != len(written.items):
        raise _MismatchError(written, hint)
    values = [_read(item, kind) for item, kind in zip(written.items, types, strict=True)]
    return values if get_origin(hint) is list else tuple(values)


def _read_mapping(written: Written, hint: Any) -> dict[str, Any]:
    if not isinstance(written, Table):
        raise _MismatchError(written, hint)
    return {key.text: _read(value, get_args(hint)[1]) for key, value in written.entries}


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _is_sequence(hint: Any) -> bool:
    return get_origin(hint) in (tuple, list, Sequence)


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) in (dict, Mapping)


def _as_declared(value: Any, hint: Any) -> Any:
    members = get_args(hint) if _is_union(hint) else (hint,)
    is_float = float in members and int not in members
    if is_float and type(value) is int and math.isfinite(value):
        return float(value)
    return value


def _quote(written: Written) -> str:
    if isinstance(written, Word):
        return f"'{written.text}'"
    return "a list" if isinstance(written, Listing) else "a table"


def _advice(written: Written, hint: Any) -> str | None:
    if not isinstance(written, Word):
        return None
    if _is_sequence(hint):
        return f"a list is written [{written.text}]"
    choices = [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []
    near = get_close_matches(written.text, choices, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else None
