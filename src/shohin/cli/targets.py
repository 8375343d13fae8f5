"""``shohin targets``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shohin.cli.options import AsJson
from shohin.cli.screen import lines, show, show_json

if TYPE_CHECKING:
    from shohin.backends.registry import TargetDescription


def targets(
    kind: Annotated[
        str | None,
        typer.Argument(metavar="KIND", help="A kind to describe in full.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the kinds of target, or describe one: its options, and what it uses on each processor.

    \b
    Examples:
      shohin targets
      shohin targets arm
    """  # noqa: D301 - \b keeps typer from joining the lines
    from shohin.backends.registry import describe_target, target_kinds

    if kind is None:
        found = [describe_target(known) for known in target_kinds()]
        if as_json:
            show_json({"targets": [{"kind": item.kind, "summary": item.summary} for item in found]})
            return
        show(lines((item.kind, item.summary) for item in found))
        return
    described = describe_target(kind)
    if as_json:
        show_json(asdict(described))
        return
    _show_target(described)


def _show_target(described: "TargetDescription") -> None:
    from shohin.tables import Grid

    show(described.kind, "", described.doc)
    options = tuple(
        (option.name, option.type, "(must be given)" if option.default is None else option.default)
        for option in described.options
    )
    if options:
        show("", Grid("", ("option", "type", "default"), options))
        show(
            "", lines((option.name, option.help.replace("``", "")) for option in described.options)
        )
    if described.variants:
        heads = ("target", *described.variants[0].facts, "runs here")
        rows = tuple(
            (one.text, *one.facts.values(), "no" if one.problem else "yes")
            for one in described.variants
        )
        show("", Grid("", heads, rows))
