"""``shohin passes``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli.options import AsJson
from shohin.cli.screen import lines, show, show_json

if TYPE_CHECKING:
    from shohin.passes.registry import PassDescription


def passes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A pass to describe in full.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the passes, or describe one: what it does, its options, what it requires.

    \b
    Examples:
      shohin passes
      shohin passes prune
    """  # noqa: D301 - \b keeps typer from joining the lines
    from shohin.passes.registry import describe, pass_names

    if name is None:
        found = [describe(known) for known in pass_names()]
        if as_json:
            show_json({"passes": [{"name": item.name, "summary": item.summary} for item in found]})
            return
        show(lines((item.name, item.summary) for item in found))
        return
    described = describe(name)
    if as_json:
        show_json(_plain(described))
        return
    _show_pass(described)


def _show_pass(described: "PassDescription") -> None:
    from shohin.tables import Grid

    show(described.name, "", described.doc, "")
    facts = {
        "requires": described.requires,
        "establishes": described.establishes,
        "invalidates": described.invalidates,
    }
    show(lines((label, ", ".join(found)) for label, found in facts.items()))
    rows = tuple(
        (option.name, option.type, "(must be given)" if option.default is None else option.default)
        for option in described.options
    )
    if rows:
        show("", Grid("", ("option", "type", "default"), rows))


def _plain(described: "PassDescription") -> dict[str, Any]:
    return {
        key: [str(fact) for fact in value]
        if key in ("requires", "establishes", "invalidates")
        else value
        for key, value in asdict(described).items()
    }
