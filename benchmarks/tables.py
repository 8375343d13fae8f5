"""What benchmarks share: tables, and files of results."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

RESULTS = Path(__file__).parent / "results"


class Table:
    """A table that can be printed and written as Markdown."""

    def __init__(self, title: str, headings: Sequence[str]) -> None:
        self.title = title
        self.headings = tuple(headings)
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Append a row."""
        self.rows.append(cells)

    def show(self) -> None:
        """Print it."""
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        Console(width=150).print(table)

    def markdown(self) -> str:
        """It as Markdown."""
        lines = [self.title, "", "| " + " | ".join(self.headings) + " |"]
        lines.append("|---|" + "---:|" * (len(self.headings) - 1))
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write figures as JSON, one row of each list a line."""
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_lines(part)}" for key, part in value.items()]
        text = "{" + ",\n".join(parts) + "}"
    else:
        text = _lines(value)
    path.write_text(text + "\n")


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ",\n ".join(json.dumps(row) for row in value) + "]"
    return json.dumps(value)


def with_earlier(
    name: str, rows: Iterable[dict[str, Any]], order: Iterable[str]
) -> list[dict[str, Any]]:
    """Rows by their ``network``, and for what was not measured now the rows of the results file."""
    path = RESULTS / f"{name}.json"
    earlier: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    found = {row["network"]: row for row in (*earlier, *rows)}
    return [found[network] for network in order if network in found]


def save(name: str, rows: Sequence[Any], tables: Sequence[Table]) -> None:
    """Print tables, and write them and the figures behind them to the results folder."""
    for table in tables:
        table.show()
    write_json(RESULTS / f"{name}.json", list(rows))
    (RESULTS / f"{name}.md").write_text("\n".join(table.markdown() for table in tables))
