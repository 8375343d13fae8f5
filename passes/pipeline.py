"""Pipelines as text: ``"fold-bn, prune{density=0.1}"`` to passes and back."""

import re
from collections.abc import Callable, Iterable

from shohin.errors import SpecError, near_name_hint
from shohin.passes.base import Pass
from shohin.passes.options import changed_options, option_defaults, option_types, read_value
from shohin.passes.registry import pass_class
from shohin.spec import Source, WrittenOption, WrittenSpec, format_spec, parse_specs


def parse_pipeline(text: str, lookup: Callable[[str], type[Pass]] = pass_class) -> tuple[Pass, ...]:
    """Read the passes of a pipeline.

    Args:
        text: passes separated by commas, each with its options:
            ``fold-bn, prune{density=0.1 include=[conv1,conv2]}``.
        lookup: gives the class of a pass by name; the registry by default.

    Raises:
        SpecError: with a caret under the exact column: on a syntax error, an unknown pass or
            option, or a value of a wrong type or out of range.
    """
    source = Source(text, "pipeline")
    return tuple(_build(spec, source, lookup) for spec in parse_specs(source))


def format_pipeline(passes: Iterable[Pass]) -> str:
    """The canonical text of a pipeline; `parse_pipeline` gives equal passes back."""
    return ", ".join(format_pass(instance) for instance in passes)


def format_pass(instance: Pass) -> str:
    """The canonical text of a pass: the options that are not at their defaults, in order."""
    return format_spec(instance.name, changed_options(instance))


def _build(spec: WrittenSpec, source: Source, lookup: Callable[[str], type[Pass]]) -> Pass:
    try:
        owner = lookup(spec.name)
    except SpecError as error:
        raise source.error(spec.column, error.problem, error.hint) from error
    types = option_types(owner)
    for option in spec.options:
        _check_known(option, spec, source, tuple(types))
    missing = types.keys() - option_defaults(owner).keys() - {o.name for o in spec.options}
    for name in (name for name in types if name in missing):
        raise source.error(spec.column, f"pass '{spec.name}' needs option '{name}'")
    return _validated(owner, spec, source)


def _validated(owner: type[Pass], spec: WrittenSpec, source: Source) -> Pass:
    types = option_types(owner)
    values = {
        option.name: read_value(option.value, types[option.name], source, _label(option, spec))
        for option in spec.options
    }
    try:
        instance = owner(**values)
        instance.validate()
    except SpecError as error:
        column = _column_of_fault(error, spec)
        problem = f"{error.where}: {error.problem}" if error.where else error.problem
        raise source.error(column, problem, error.hint) from error
    return instance


def _label(option: WrittenOption, spec: WrittenSpec) -> str:
    return f"option '{option.name}' of pass '{spec.name}'"


def _check_known(
    option: WrittenOption, spec: WrittenSpec, source: Source, known: tuple[str, ...]
) -> None:
    if option.name in known:
        return
    problem = f"unknown option '{option.name}' of pass '{spec.name}'"
    hint = near_name_hint(option.name, known) if known else "it has no options"
    raise source.error(option.column, problem, hint)


def _column_of_fault(error: SpecError, spec: WrittenSpec) -> int:
    """Where the value of the option lies that the error names, its `where` looked at first."""
    for text in (error.where, error.problem):
        words = set(re.findall(r"\w+", text))
        for option in spec.options:
            if option.name in words:
                return option.value.column
    return spec.column
