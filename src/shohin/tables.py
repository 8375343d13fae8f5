"""Tables that can be printed in a terminal or written as Markdown."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

ARROW = "→"
_GAP = 3


@dataclass(frozen=True)
class Grid:
    """A table of texts, which a rich console can print.

    Attributes:
        title: a line above it.
        columns: heads of the columns; one that starts with ``>`` is aligned to the right.
        rows: texts of the cells, row by row.
        footer: texts of a last row, empty for none.
        optional: heads of columns to leave out, in this order, where the table is too wide.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        yield self.fit(options.max_width)._table()

    def width(self) -> int:
        """Columns of a terminal that it takes when nothing is wrapped."""
        rows = [[head.lstrip(">") for head in self.columns], *self.rows]
        rows += [self.footer] if self.footer else []
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        return sum(widths) + _GAP * (len(widths) - 1)

    def fit(self, width: int) -> "Grid":
        """The table without as many of its optional columns as make it fit a width."""
        if self.width() <= width or not self.optional:
            return self
        name, *rest = self.optional
        return replace(self._without(self.columns.index(name)), optional=tuple(rest)).fit(width)

    def _without(self, index: int) -> "Grid":
        rows = tuple((*row[:index], *row[index + 1 :]) for row in self.rows)
        columns = (*self.columns[:index], *self.columns[index + 1 :])
        footer = (*self.footer[:index], *self.footer[index + 1 :])
        return replace(self, columns=columns, rows=rows, footer=footer)

    def _table(self) -> Table:
        table = Table(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            show_footer=bool(self.footer),
        )
        for index, head in enumerate(self.columns):
            footer = self.footer[index] if self.footer else ""
            is_figure = head.startswith(">")
            table.add_column(
                Text(head.lstrip(">")),
                Text(footer),
                justify="right" if is_figure else "left",
                overflow="fold",
                no_wrap=is_figure,
            )
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """The table in Markdown, its title as a heading."""
        heads = [head.lstrip(">") for head in self.columns]
        rules = ["---:" if head.startswith(">") else "---" for head in self.columns]
        rows = [*self.rows, *([self.footer] if self.footer else [])]
        lines = [_markdown_row(row) for row in (heads, rules, *rows)]
        return "\n".join([f"## {self.title}", "", *lines] if self.title else lines)


def render(parts: Iterable[RenderableType], width: int) -> str:
    """Plain text of what a rich console would show, without blanks at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, (str, Text)), markup=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def change(before: str, after: str) -> str:
    """``before → after``, or just one of them where they are the same or one is missing."""
    if before == after or not before:
        return after
    return f"{before} {ARROW} {after or 'none'}"


def ratio(before: float, after: float) -> str:
    """How many times smaller something became, e.g. ``9.8x``; empty where that says nothing."""
    return f"{before / after:.3g}x" if after and before != after else ""


def shape_text(shapes: Iterable[Sequence[int]]) -> str:
    """``20x1x5x5``, several joined by a plus."""
    return " + ".join("x".join(str(size) for size in shape) or "scalar" for shape in shapes)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
