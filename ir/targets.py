"""Operators as text, and back: the only functions that a stored graph can call."""

import math
import operator
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch._ops import OpOverload

from shohin.errors import ArtifactError, near_name_hint

Target: TypeAlias = Callable[..., Any]
_NAME = re.compile(r"([A-Za-z]\w*)\.(\w+)\.([A-Za-z]\w*)")
_OPERATOR = (
    "add and_ eq floordiv ge getitem gt index le lt mod mul ne neg not_ or_ pos pow sub truediv"
)
_MATH = "ceil floor log2 sqrt trunc"
_SYMBOLIC = "sym_float sym_int sym_ite sym_max sym_min sym_not"


def _list_functions() -> dict[str, Target]:
    groups = ((operator, _OPERATOR), (math, _MATH), (torch, _SYMBOLIC))
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for module, names in groups
        for name in names.split()
    }


_FUNCTIONS = _list_functions()
_NAMES = {function: name for name, function in _FUNCTIONS.items()}


def name_target(target: object) -> str | None:
    """The text of an operator: ``aten.conv2d.default``, ``operator.getitem``.

    Returns:
        None for a function that files cannot hold.
    """
    if isinstance(target, OpOverload):
        return str(target)
    return _NAMES.get(target) if callable(target) else None


def find_target(text: str) -> Target:
    """The operator of a text that `name_target` gave.

    Only operators registered with torch and a fixed list of arithmetic functions are found.

    Raises:
        ArtifactError: when there is no such operator.
    """
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    parts = _NAME.fullmatch(text)
    found = _find_overload(*parts.groups()) if parts else None
    if found is None:
        hint = f"import the package that registers it; or {near_name_hint(text, [*_FUNCTIONS])}"
        raise ArtifactError(f"operator '{text}'", "torch knows no such operator", hint)
    return found


def _find_overload(namespace: str, name: str, overload: str) -> OpOverload | None:
    packet = getattr(getattr(torch.ops, namespace, None), name, None)
    found = getattr(packet, overload, None)
    return found if isinstance(found, OpOverload) else None
