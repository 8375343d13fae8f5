"""The text of a target: ``cpu{arch=x86-64-v3 threads=2}`` to the options of its kind."""

import re
from collections.abc import Mapping
from typing import Any

from shohin.errors import SpecError, near_name_hint
from shohin.passes.options import (
    IsDataclass,
    changed_options,
    option_defaults,
    option_types,
    read_value,
)
from shohin.spec import Source, WrittenOption, WrittenSpec, format_spec, parse_specs


def written_target(text: str) -> WrittenSpec:
    """The one name with options that a target's text is, as it was written.

    Raises:
        SpecError: with a caret under the exact column, on a syntax error or a second name.
    """
    source = Source(text, "target")
    first, *others = parse_specs(source)
    if others:
        raise source.error(others[0].column, f"expected one target, got '{others[0].name}' as well")
    return first


def read_target(text: str, kinds: Mapping[str, type[IsDataclass]]) -> Any:
    """Read the options of a target.

    Args:
        text: e.g. ``cpu{arch=x86-64-v3 threads=2}``.
        kinds: the dataclass of the options, by kind of target. What it raises as a `SpecError`
            should name the option.

    Returns:
        An instance of the kind's dataclass.

    Raises:
        SpecError: with a caret under the exact column: on a syntax error, an unknown kind or
            option, or a value of a wrong type or out of range.
    """
    source, spec = Source(text, "target"), written_target(text)
    if spec.name not in kinds:
        hint = near_name_hint(spec.name, tuple(kinds))
        raise source.error(spec.column, f"unknown target '{spec.name}'", hint)
    owner = kinds[spec.name]
    _check_names(owner, spec, source)
    types = option_types(owner)
    values = {
        option.name: read_value(option.value, types[option.name], source, _label(option, spec))
        for option in spec.options
    }
    try:
        return owner(**values)
    except SpecError as error:
        raise source.error(_column_of_fault(error, spec), error.problem, error.hint) from error


def format_target_text(kind: str, options: IsDataclass) -> str:
    """The canonical text of a target: the options that are not at their defaults, in order."""
    return format_spec(kind, changed_options(options))


def _check_names(owner: type[IsDataclass], spec: WrittenSpec, source: Source) -> None:
    known = tuple(option_types(owner))
    for option in spec.options:
        if option.name not in known:
            problem = f"unknown option '{option.name}' of target '{spec.name}'"
            hint = near_name_hint(option.name, known) if known else "it has no options"
            raise source.error(option.column, problem, hint)
    missing = set(known) - option_defaults(owner).keys() - {o.name for o in spec.options}
    for name in (name for name in known if name in missing):
        raise source.error(spec.column, f"target '{spec.name}' needs option '{name}'")


def _label(option: WrittenOption, spec: WrittenSpec) -> str:
    return f"option '{option.name}' of target '{spec.name}'"


def _column_of_fault(error: SpecError, spec: WrittenSpec) -> int:
    """Where the value of the option lies that the error names."""
    words = set(re.findall(r"\w+", f"{error.where} {error.problem}"))
    named = (option.value.column for option in spec.options if option.name in words)
    return next(named, spec.column)
