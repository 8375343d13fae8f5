"""Options as people read them: names, types, defaults, and what docstrings say of them."""

import inspect
import re
from dataclasses import dataclass

from shohin.passes.options import IsDataclass, describe_type, option_defaults, option_types
from shohin.spec import format_value


@dataclass(frozen=True)
class OptionDescription:
    """One option of a pass or a target.

    Attributes:
        name: its name.
        type: its type as people read it, e.g. ``linear | nonlinear``.
        default: the text of its default; None when the option must be given.
        help: what the docstring says about it.
    """

    name: str
    type: str
    default: str | None
    help: str = ""


def describe_options(owner: type[IsDataclass]) -> tuple[OptionDescription, ...]:
    """The options of a dataclass, in order."""
    doc, defaults = inspect.getdoc(owner) or "", option_defaults(owner)
    return tuple(
        OptionDescription(
            name,
            describe_type(hint),
            format_value(defaults[name]) if name in defaults else None,
            _help(name, doc),
        )
        for name, hint in option_types(owner).items()
    )


def _help(name: str, doc: str) -> str:
    """The entry of an option in a Google style docstring, joined to one line."""
    found = re.search(rf"^( *){name}: (.+(?:\n\1 +.+)*)", doc, re.MULTILINE)
    return " ".join(found[2].split()) if found else ""
