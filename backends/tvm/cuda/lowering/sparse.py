"""Weights that are not zero, in lists by output."""

import numpy as np

from shohin.backends.tvm.lowering.operations import Array


def lists_of(weight: Array) -> tuple[Array, Array, Array]:
    """Compressed sparse rows.

    Args:
        weight: ``[outputs, depth]``.

    Returns:
        Where the list of each output begins, int32 ``[outputs + 1]``; columns, int64; weights.
    """
    rows, columns = np.nonzero(weight)
    start = np.zeros(len(weight) + 1, np.int32)
    np.cumsum(np.bincount(rows, minlength=len(weight)), out=start[1:])
    return start, columns, weight[rows, columns]
