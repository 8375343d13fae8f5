"""What every weight takes, as in tables 2 to 4 of Deep Compression (arXiv 1510.00149)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tables import Table

import shohin
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import weight_names
from shohin.ir.serialise import ProgramFile
from shohin.passes.entropy_code import stream_figures
from shohin.waterfall import waterfall


class Published(NamedTuple):
    """A row of the paper.

    Attributes:
        kept: weights left by pruning, %.
        weight: bits of a weight, coded.
        index: bits of an index, coded.
        rate: size after all steps, % of the original.
    """

    kept: float
    weight: float
    index: float
    rate: float


PAPER: Mapping[str, Sequence[Published]] = {
    "lenet-300-100": (
        Published(8, 4.4, 3.7, 2.32),
        Published(9, 4.4, 4.3, 3.04),
        Published(26, 4.3, 3.2, 12.70),
    ),
    "lenet-5": (
        Published(66, 7.2, 1.5, 67.45),
        Published(12, 7.2, 3.9, 5.28),
        Published(8, 4.5, 4.5, 2.45),
        Published(19, 5.2, 3.7, 6.13),
    ),
    "alexnet": (
        Published(84, 6.3, 1.2, 20.53),
        Published(38, 5.5, 2.3, 9.43),
        Published(35, 5.1, 2.6, 8.44),
        Published(37, 5.2, 2.5, 9.11),
        Published(37, 5.6, 2.5, 9.43),
        Published(9, 3.9, 3.2, 2.39),
        Published(9, 3.6, 3.7, 2.46),
        Published(25, 4.0, 3.2, 5.85),
    ),
}
"""Rows of the weights in order; biases have none."""


def layer_table(title: str, path: Path, network: str) -> Table:
    """What every weight of a program file takes.

    Args:
        title: of the table.
        path: the file.
        network: in `PAPER`, or one that the paper does not have.
    """
    published = list(PAPER.get(network, ()))
    headings = ("weight", "kept %", "bits", "index bits", "codebook", "bytes", "%")
    behind = ("paper: kept %", "bits", "index bits", "%") if published else ()
    table = Table(title, (*headings, *behind))
    found = waterfall(path)
    order = {name: place for place, name in enumerate(weight_names(shohin.load(path)))}
    with ProgramFile(path) as file:
        for fall in sorted(found.falls, key=lambda fall: order.get(fall.name, len(order))):
            encoding = file.encoding(fall.name)
            matrix = len(encoding.shape) > 1
            paper = published.pop(0) if published and matrix else None
            cells = _published(paper) if behind else ()
            rate = f"{100 * fall.stored / fall.original:.2f}"
            table.add(fall.name, *_streams(encoding), f"{fall.stored:,}", rate, *cells)
    blank = ("",) * len(behind)
    table.add("header", "", "", "", "", f"{found.frame:,}", "", *blank)
    totals = found.totals
    rate = f"{100 * totals[-1] / totals[0]:.2f}"
    table.add("whole file", "", "", "", "", f"{totals[-1]:,}", rate, *blank)
    return table


def _published(row: Published | None) -> tuple[str, ...]:
    if row is None:
        return ("",) * 4
    return f"{row.kept:g}", f"{row.weight:g}", f"{row.index:g}", f"{row.rate:g}"


def _streams(encoding: Encoding) -> tuple[str, str, str, str]:
    """Elements that are kept, %, bits of each and of its place, and bytes of the codebook."""
    figures = stream_figures(encoding)
    count, total = encoding.nonzeros(), encoding.parameters()
    kept = f"{100 * count / total:.1f}" if isinstance(encoding, Sparse) else "100"

    def bits(part: str) -> str:
        found = figures.get(f"{part}_bytes")
        return f"{8 * found / max(1, count):.1f}" if isinstance(found, int) else ""

    return kept, bits("index"), bits("gap"), str(figures.get("index_codebook_bytes", ""))
