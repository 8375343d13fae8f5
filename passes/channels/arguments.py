"""Changing an operator's argument by its name."""

from typing import Any

from torch import fx


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set an operator's argument by its schema name, by position where that is possible.

    Raises:
        ValueError: when the operator has no such argument.
    """
    declared = [one.name for one in node.target._schema.arguments]  # type: ignore[union-attr]
    position = declared.index(name)
    keywords = {key: given for key, given in node.kwargs.items() if key != name}
    if name not in node.kwargs and position < len(node.args):
        node.update_arg(position, value)
    elif position == len(node.args):
        node.args, node.kwargs = (*node.args, value), keywords
    else:
        node.kwargs = {**keywords, name: value}
