"""Shared weights that make up for each other's errors, as far as calibration tells.

The elements of a row are rounded to their centroids one after the other, and those that are still
to come take over what the rounding changed in the responses (Frantar and Alistarh, "Optimal Brain
Compression", NeurIPS 2022; in one order for all rows: Frantar et al., "GPTQ", arXiv 2210.17323).
Which centroid an element has is fixed then, and the centroids are the solution of a least-squares
problem. Layers are taken in data-flow order, each for the inputs that those before it leave and
against the responses of the original network. All of it is float64.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.pruning.moments import Sampling
from shohin.passes.pruning.reconstruction import Surgeon, find_layers
from shohin.passes.pruning.surgeon import Problem, reconstruct, submatrices
from shohin.passes.sharing.layers import Sharing, round_to, write

_DAMPING = 0.01
_POSITIONS = 1024
_COHERENCE = 4.0
_MEMORY = 1 << 30  # bytes of activations that are kept between layers


def compensate(
    program: Program, sharings: Sequence[Sharing], names: Collection[str], context: Context
) -> list[Sharing]:
    """Assign the elements of weights to their centroids anew, and fit the centroids.

    Args:
        program: changed in place: weights, and biases that nothing else reads.
        sharings: with centroids to start from.
        names: the weights to compensate, of two-dimensional convolutions and linear maps; the
            others are shared as they are.
        context: gives the calibration batches.

    Returns:
        The sharings in the given order.

    Raises:
        InputError: when there are no calibration batches.
        UnsupportedError: naming a layer that is neither conv2d nor linear, or too wide.
        PassError: naming a layer whose inputs are not finite.
    """
    known = {one.layer.name: one for one in sharings if one.layer.name in names}
    batches = list(context.calibration)
    surgeon = Surgeon(
        program, batches, _DAMPING, Sampling(_POSITIONS, context.seed, _COHERENCE), _MEMORY
    )
    found = {one.layer.name: one for one in sharings}
    # Layers after them make up for the errors of those that are left alone, too.
    for one in (one for name, one in found.items() if name not in known):
        write(one)
    for done, layer in enumerate(find_layers(program, list(known))):
        context.progress(done, len(known), f"responses of {layer.name}")
        sharing = known[layer.name]
        problem = surgeon.problem(layer)
        weights = without_bias(problem)
        held = sharing.layer.held
        mask = None if held is None else held.mask.flatten(1)
        centroids = torch.from_numpy(sharing.centroids).double()
        assigned = assign(weights, mask, centroids)
        fitted = _sharing(sharing, assigned, fit_centroids(weights, assigned, centroids))
        surgeon.write(layer, with_bias(problem, _rows(fitted, assigned >= 0)))
        found[layer.name] = fitted
    return [found[one.layer.name] for one in sharings]


def without_bias(problem: Problem) -> Problem:
    """The problem of the weights alone, each bias being at its best for them."""
    count = problem.priority.shape[1]
    if count == problem.start.shape[1]:
        return problem
    side, corner = problem.hessian[:, :count, count], problem.hessian[:, count, count]
    ratio = side / corner.unsqueeze(1)
    hessian = problem.hessian[:, :count, :count] - ratio.unsqueeze(2) * side.unsqueeze(1)
    target = problem.target[:, :count] - problem.target[:, count:] * ratio[problem.groups]
    pull, start = problem.pull[:, :count], problem.start[:, :count]
    return Problem(hessian, pull, target, start, problem.priority)


def with_bias(problem: Problem, rows: Tensor) -> Tensor:
    """Rows of weights, and each bias at its best for them if there is one."""
    count = rows.shape[1]
    if count == problem.start.shape[1]:
        return rows
    hessian = problem.hessian[problem.groups, count]
    lack = problem.target[:, count] - (rows * hessian[:, :count]).sum(1)
    return torch.cat([rows, (lack / hessian[:, count]).unsqueeze(1)], 1)


def assign(problem: Problem, mask: Tensor | None, centroids: Tensor) -> Tensor:
    """The centroid of each element, the error of each made up for by the elements after it.

    Elements with strong inputs are rounded first, while most of the others can still change.

    Args:
        problem: of weights alone.
        mask: bool `[rows, weights]`, what is kept; None for everything.
        centroids: ascending float64 `[k]`.

    Returns:
        int64 `[rows, weights]`, -1 where an element is not kept.
    """
    if mask is None:
        every = range(len(problem.hessian))
        return torch.cat([_assign_group(problem, group, centroids) for group in every])
    start, groups = reconstruct(problem, mask), problem.groups
    parts = [
        _assign_sparse(problem.hessian[groups[rows]], start[rows], mask[rows], centroids)
        for rows in problem.row_chunks()
    ]
    return torch.cat(parts)


def fit_centroids(problem: Problem, assigned: Tensor, centroids: Tensor) -> Tensor:
    """The centroids of least error, the assignments fixed.

    Args:
        problem: of weights alone.
        assigned: int64 `[rows, weights]`, the centroid of each element, -1 for a zero.
        centroids: float64 `[k]`; those that nothing is assigned to stay.
    """
    count = len(centroids)
    system = torch.zeros(count, count, dtype=torch.float64)
    right = torch.zeros(count, dtype=torch.float64)
    for row, group in enumerate(problem.groups.tolist()):
        members = functional.one_hot(assigned[row] + 1, count + 1)[:, 1:].double()
        system += members.mT @ (problem.hessian[group] @ members)
        right += members.mT @ problem.target[row]
    used = system.diagonal() > 0
    fitted = centroids.clone()
    solved = torch.linalg.lstsq(system[used][:, used], right[used].unsqueeze(1), driver="gelsd")
    fitted[used] = solved.solution.squeeze(1)
    return fitted


def _sharing(sharing: Sharing, assigned: Tensor, centroids: Tensor) -> Sharing:
    """With the centroids ascending, different and used, as the weight's element type has them."""
    rounded = torch.from_numpy(round_to(centroids.float().numpy(), sharing.layer.dtype))
    values = rounded[assigned[assigned >= 0]].numpy()
    table, numbers = np.unique(values, return_inverse=True)
    return replace(sharing, centroids=table, indices=numbers.reshape(-1).astype(np.uint8))


def _rows(sharing: Sharing, kept: Tensor) -> Tensor:
    """The elements as a matrix, float64 `[rows, weights]`."""
    rows = torch.zeros(kept.shape, dtype=torch.float64)
    rows[kept] = torch.from_numpy(sharing.centroids[sharing.indices]).double()
    return rows


def _assign_group(problem: Problem, group: int, centroids: Tensor) -> Tensor:
    """All rows of a group, which share an order and an inverse."""
    hessian = problem.hessian[group]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order])
    rows = problem.start[problem.groups == group][:, order]
    found = torch.empty(rows.shape, dtype=torch.int64)
    for column in range(rows.shape[1]):
        found[:, order[column]], error = _round(rows[:, column], centroids)
        error = error / factor[column, column]
        rows[:, column + 1 :] -= error.unsqueeze(1) * factor[column, column + 1 :]
    return found


def _assign_sparse(hessians: Tensor, rows: Tensor, kept: Tensor, centroids: Tensor) -> Tensor:
    """Rows that keep different elements: each has an order and an inverse of its own.

    Args:
        hessians: `[rows, weights, weights]`.
        rows: `[rows, weights]`.
        kept: bool of that shape.
        centroids: ascending `[k]`.
    """
    counts = kept.sum(1, keepdim=True)
    strength = torch.where(kept, hessians.diagonal(dim1=1, dim2=2), -1.0)
    order = torch.sort(strength, dim=1, descending=True, stable=True).indices
    order = order[:, : int(counts.max())]
    # Rows that keep fewer elements are filled up with the identity.
    used = torch.arange(order.shape[1]) < counts
    smaller = submatrices(hessians, torch.arange(len(rows)), order)
    smaller *= used.unsqueeze(1) & used.unsqueeze(2)
    smaller.diagonal(dim1=1, dim2=2).add_((~used).double())
    factor, left = inverse_factor(smaller), rows.gather(1, order)
    chosen = torch.empty(order.shape, dtype=torch.int64)
    for column in range(order.shape[1]):
        chosen[:, column], error = _round(left[:, column], centroids)
        error = torch.where(used[:, column], error / factor[:, column, column], 0.0)
        left[:, column + 1 :] -= error.unsqueeze(1) * factor[:, column, column + 1 :]
    return torch.full(rows.shape, -1).scatter_(1, order, torch.where(used, chosen, -1))


def _round(values: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the nearest centroids, the lower of two equally near ones, and the errors."""
    middles = (centroids[1:] + centroids[:-1]) / 2
    chosen = torch.searchsorted(middles, values.contiguous())
    return chosen, values - centroids[chosen]


def inverse_factor(hessians: Tensor) -> Tensor:
    """`U` with ``H^-1 = U^T U``.

    Its row `j`, over its diagonal, is what the rounding of element `j` asks of those after it.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessians))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
