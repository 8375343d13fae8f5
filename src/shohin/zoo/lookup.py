"""Find an entry of a table by name, with a suggestion where the name is misspelt."""

from collections.abc import Mapping
from typing import TypeVar

from shohin.errors import SpecError, near_name_hint

_Value = TypeVar("_Value")


def find(table: Mapping[str, _Value], name: str, where: str) -> _Value:
    """Return `table[name]`.

    Raises:
        SpecError: No such name; the hint gives the nearest ones, or all of them.
    """
    if name in table:
        return table[name]
    raise SpecError(where, f"unknown name {name!r}", near_name_hint(name, tuple(table)))
