"""Sharing out lists of weights among work items."""

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.emit import Array

GROUP_WEIGHTS = 4096
"""Weights of a work item: enough to outweigh its start, few enough to share out evenly."""


def even_groups(weights: NDArray[np.integer], groups: int) -> Array:
    """First output of each group and the end, with about equally many weights between."""
    work = np.cumsum(np.asarray(weights, np.int64) + 4)
    bounds = [int(np.searchsorted(work, work[-1] * g / groups)) for g in range(1, groups)]
    return np.array([0, *bounds, len(weights)], np.int32)
