"""Optimal brain surgeon on the rows of a weight: which elements to drop, what the others become.

Hassibi and Stork 1993; for one layer, exact and greedy: Frantar and Alistarh, "Optimal Brain
Compression", NeurIPS 2022. All of it is float64.

A row `w` has the error ``(w - w*) H (w - w*)^T`` above its least, at `w*`. To drop element `p`
exactly, with the other elements at their best, raises it by ``w_p^2 / [H^-1]_pp``; then::

    w    <- w - w_p / [H^-1]_pp  H^-1[p, :]
    H^-1 <- H^-1 - H^-1[:, p] H^-1[p, :] / [H^-1]_pp

Each row drops another sequence of elements, and so has an inverse of its own in the end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_MEMORY = 256 << 20  # bytes of inverses at a time
_FAR = 1e200  # beyond every rise of an error
_BLOCK = 32  # eliminations between two updates of the inverses

LARGEST_INPUTS = 5792
"""Most inputs of a row: the inverse of a single one then takes all of the memory."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The least-squares problem of a layer.

    The last of the `inputs` columns may belong to a bias; it has no weight to drop.

    Attributes:
        hessian: positive definite, `[groups, inputs, inputs]`.
        pull: what of its diagonal pulls to the present weights, `[groups, inputs]`.
        target: ``w* H`` for each row, `[groups * rows, inputs]`.
        start: the rows `w*` of least error, of the same shape.
        priority: elements below zero are dropped before all others, the least first;
            float64 `[groups * rows, weights]`.
    """

    hessian: Tensor
    pull: Tensor
    target: Tensor
    start: Tensor
    priority: Tensor

    @property
    def groups(self) -> Tensor:
        """The group of each row."""
        rows = self.start.shape[0] // self.hessian.shape[0]
        return torch.arange(self.hessian.shape[0]).repeat_interleave(rows)

    def row_chunks(self) -> list[slice]:
        """Rows to treat at once, so that a matrix for each of them fits the memory."""
        rows, inputs = self.start.shape
        step = max(1, _MEMORY // (8 * inputs * inputs))
        return [slice(first, first + step) for first in range(0, rows, step)]


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which each row drops all of its elements.

    Attributes:
        order: positions in the row, int64 `[rows, weights]`.
        increments: rise of the row's error at each step, of the same shape; its priority where
            that is below zero.
    """

    order: Tensor
    increments: Tensor

    def thresholds(self) -> Tensor:
        """Largest increment of a row up to each step.

        Steps of the rows sorted by it are those that always the cheapest next step of any row
        would take.
        """
        return self.increments.cummax(1).values

    def errors(self) -> Tensor:
        """Rise of the error of all rows together, by number of elements dropped, less one."""
        steps = torch.sort(self.thresholds().flatten(), stable=True).indices
        return self.increments.flatten()[steps].clamp_min(0.0).cumsum(0)

    def mask(self, dropped: int) -> Tensor:
        """What is kept, bool `[rows, weights]`, when the cheapest steps are taken.

        Args:
            dropped: number of elements to drop from all rows together.
        """
        thresholds = self.thresholds()
        steps = torch.sort(thresholds.flatten(), stable=True).indices[:dropped]
        taken = torch.zeros(thresholds.numel(), dtype=torch.bool)
        taken[steps] = True
        mask = torch.ones_like(self.order, dtype=torch.bool)
        return mask.scatter_(1, self.order, ~taken.view(thresholds.shape))


def eliminate(problem: Problem) -> Elimination:
    """Drop all elements of each row, always the one that raises the row's error least."""
    inverses = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian))
    groups = problem.groups
    parts = [
        _eliminate(
            problem.start[rows].clone(), inverses[groups[rows]], problem.priority[rows].clone()
        )
        for rows in problem.row_chunks()
    ]
    orders, increments = zip(*parts, strict=True)
    return Elimination(torch.cat(orders), torch.cat(increments))


def _eliminate(weights: Tensor, inverses: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """Order and increments of some rows.

    Args:
        weights: `[rows, inputs]`; changed.
        inverses: an inverse Hessian for each, `[rows, inputs, inputs]`; changed.
        priority: `[rows, weights]`; changed.
    """
    orders, increments = [], []
    places = torch.arange(weights.shape[1]).expand(len(weights), -1)
    while priority.shape[1] > 0:
        chosen, rises = _eliminate_block(weights, inverses, priority)
        orders.append(places.gather(1, chosen))
        increments.append(rises)
        # Every row has lost as many: what is left is a smaller problem of the same kind.
        left = torch.ones_like(weights, dtype=torch.bool).scatter_(1, chosen, False)
        index = left.nonzero()[:, 1].view(len(weights), -1)
        places, weights = places.gather(1, index), weights.gather(1, index)
        inverses = submatrices(inverses, torch.arange(len(weights)), index)
        priority = priority.gather(1, index[:, : priority.shape[1] - chosen.shape[1]])
    return torch.cat(orders, 1), torch.cat(increments, 1)


def _eliminate_block(weights: Tensor, inverses: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and increments of some eliminations, `[rows, eliminations]`; all is changed."""
    rows, count = torch.arange(len(weights)), priority.shape[1]
    chosen = torch.empty(len(weights), min(_BLOCK, count), dtype=torch.int64)
    rises = torch.empty(chosen.shape, dtype=weights.dtype)
    diagonals = inverses.diagonal(dim1=1, dim2=2).clone()
    # The inverses are brought up to date once for all eliminations of a block; until then
    # ``inverse - done^T done`` stands for each.
    block = torch.zeros(*chosen.shape, weights.shape[1], dtype=weights.dtype)
    for step in range(chosen.shape[1]):
        scores = weights[:, :count] ** 2 / diagonals[:, :count] + _FAR * priority
        column, done = scores.argmin(1), block[:, :step]
        shift = done[rows, :, column].unsqueeze(1) @ done
        row = inverses[rows, column] - shift.squeeze(1)
        row = row / row[rows, column].sqrt().unsqueeze(1)
        factors = weights[rows, column] / row[rows, column]
        given = priority[rows, column]
        chosen[:, step] = column
        rises[:, step] = torch.where(given < 0, given, factors**2)
        block[:, step] = row
        weights -= factors.unsqueeze(1) * row
        diagonals -= row**2
        weights[rows, column] = 0.0
        diagonals[rows, column] = 1.0
        priority[rows, column] = torch.inf  # never again
    inverses.baddbmm_(block.mT, block, alpha=-1.0)
    return chosen, rises


def submatrices(matrices: Tensor, owners: Tensor, index: Tensor) -> Tensor:
    """Some rows and columns of a matrix for each row of an index.

    Args:
        matrices: `[matrices, n, n]`.
        owners: which of them, int64 `[rows]`.
        index: which rows and columns of it, int64 `[rows, m]`.

    Returns:
        `[rows, m, m]`, a copy.
    """
    return matrices[owners.view(-1, 1, 1), index.unsqueeze(2), index.unsqueeze(1)]


def reconstruct(problem: Problem, mask: Tensor) -> Tensor:
    """The rows of least error whose elements outside a mask are zero.

    Args:
        problem: the layer's problem.
        mask: bool `[rows, weights]`.

    Returns:
        `[rows, inputs]`; equal to what the eliminations leave.
    """
    spare = problem.start.shape[1] - mask.shape[1]
    kept = torch.nn.functional.pad(mask, (0, spare), value=True)
    groups = problem.groups
    return torch.cat(
        [
            _solve(problem.hessian, groups[rows], problem.target[rows], kept[rows])
            for rows in problem.row_chunks()
        ]
    )


def _solve(hessians: Tensor, groups: Tensor, target: Tensor, kept: Tensor) -> Tensor:
    """Least error of some rows, `[rows, inputs]`, over the elements that are kept."""
    counts = kept.sum(1, keepdim=True)
    # The kept elements of each row first; rows that keep fewer are filled up with the identity.
    index = torch.sort(kept, dim=1, descending=True, stable=True).indices[:, : int(counts.max())]
    used = (torch.arange(index.shape[1]) < counts).to(target)
    smaller = submatrices(hessians, groups, index).mul_(used.unsqueeze(1)).mul_(used.unsqueeze(2))
    smaller.diagonal(dim1=1, dim2=2).add_(1.0 - used)
    right = (target.gather(1, index) * used).unsqueeze(2)
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(smaller)).squeeze(2)
    return torch.zeros_like(target).scatter_(1, index, solved * used)
