"""Units of pruning: elements, blocks and whole output channels.

Apart from single elements a unit is a rectangle of the matrix `[output channels, everything else]`
that a weight is seen as: 16 rows by 1 column, say, or one whole row. Rectangles at the lower and
the right edge may be cut off.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from shohin.passes.pruning.candidates import Candidate, pieces
from shohin.passes.pruning.selection import Scores

Granularity: TypeAlias = Literal["element", "block", "channel"]
_BLOCK = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one weight.

    Attributes:
        candidate: the weight.
        rows: rows of a unit; 0 for units that are single elements.
        columns: columns of a unit; 0 for units that are single elements.
    """

    candidate: Candidate
    rows: int = 0
    columns: int = 0

    @property
    def count(self) -> int:
        """Number of units."""
        if not self.rows:
            return self.candidate.weight.numel()
        rows, columns = self._grid()
        return rows * columns

    def elements_of_most(self, scores: Tensor | None, held: Tensor | None) -> Tensor:
        """Number of elements in the first unit, in the first two, and so on.

        Not for units that are single elements.

        Args:
            scores: the units come in the falling order of these; None for that of their sizes, so
                that no choice of as many units has more elements.
            held: bool tensor of the weight's shape, true where elements are left; None for all.
        """
        if held is None:
            heights, widths = self._sizes()
            sizes = (heights[:, None] * widths).flatten()
        else:
            sizes = self._sums(held).flatten()
        order = torch.sort(sizes if scores is None else scores, descending=True, stable=True)
        return sizes[order.indices].cumsum(0)

    def scores(self, values: Tensor, held: Tensor | None) -> Scores:
        """What the units are ranked by: the mean magnitude of their elements' values.

        A sum would rank units by their sizes, too, and drop those that an edge cuts off.

        Args:
            values: of the weight's shape; the weight itself, or a saliency of each element.
            held: bool tensor of the weight's shape, true where elements are left; None for all.
                A unit of which none is left may not be kept.
        """
        wide = values.dtype == torch.float64
        if not self.rows:
            return Scores(self.count, _element_pieces(values, held), wide)
        heights, widths = (sizes.to(values.dtype) for sizes in self._sizes())
        means = self._sums(values.detach()) / heights[:, None] / widths
        if held is not None:
            means = means.masked_fill(self._sums(held) == 0, -1.0)
        return Scores(self.count, lambda: pieces(means), wide)

    def spread(self, kept: Tensor) -> Tensor:
        """Bool tensor of the weight's shape from a bool vector over the units."""
        if not self.rows:
            return kept.view(self.candidate.weight.shape)
        rows, columns = self._matrix_shape()
        grid = kept.view(self._grid())
        tall = grid.repeat_interleave(self.rows, 0)[:rows]
        return self.candidate.from_matrix(tall.repeat_interleave(self.columns, 1)[:, :columns])

    def _matrix_shape(self) -> tuple[int, int]:
        weight = self.candidate.weight
        rows = weight.shape[1 if self.candidate.transposed else 0]
        return rows, weight.numel() // max(1, rows)

    def _grid(self) -> tuple[int, int]:
        """Number of units from top to bottom and from left to right."""
        rows, columns = self._matrix_shape()
        return -(-rows // self.rows), -(-columns // self.columns)

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Heights of the units from top to bottom, and widths from left to right."""
        heights, widths = (
            torch.tensor([min(part, whole - start) for start in range(0, whole, part)])
            for whole, part in zip(self._matrix_shape(), (self.rows, self.columns), strict=True)
        )
        return heights, widths

    def _sums(self, values: Tensor) -> Tensor:
        """Sum of magnitudes in each unit, `[units down, units across]`."""
        matrix = self.candidate.as_matrix(values)
        missing = -matrix.shape[1] % self.columns
        slabs = []
        for slab in torch.split(matrix, self.rows):
            total = slab.abs().sum(0) if slab.is_floating_point() else slab.sum(0)
            padded = functional.pad(total, (0, missing)) if missing else total
            slabs.append(padded.view(-1, self.columns).sum(1))
        return torch.stack(slabs)


def units_of(candidate: Candidate, granularity: Granularity, block: str) -> Units:
    """The units of a weight.

    Args:
        candidate: the weight; not grouped, unless the units are elements.
        granularity: ``element``, ``block`` or ``channel``.
        block: shape of a block, as `parse_block` reads it.
    """
    if granularity == "element":
        return Units(candidate)
    if granularity == "channel":
        weight = candidate.weight
        rows = weight.shape[1 if candidate.transposed else 0]
        return Units(candidate, 1, weight.numel() // rows)
    rows, columns = parse_block(block) or (1, 1)
    return Units(candidate, rows, columns)


def parse_block(text: str) -> tuple[int, int] | None:
    """Rows and columns of ``16x1``; None for anything else."""
    found = _BLOCK.fullmatch(text)
    return (int(found[1]), int(found[2])) if found else None


def _element_pieces(values: Tensor, held: Tensor | None) -> Callable[[], Iterator[Tensor]]:
    def generate() -> Iterator[Tensor]:
        if held is None:
            yield from (piece.abs() for piece in pieces(values))
            return
        for piece, left in zip(pieces(values), pieces(held), strict=True):
            yield piece.abs().masked_fill_(~left, -1.0)

    return generate
