"""Groups of convolutions in whole blocks of channels."""

import numpy as np

from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.lowering.operations import Array


def merge_groups(weight: Array, groups: int, channels: int) -> tuple[Array, int]:
    """Join groups until each has whole blocks of channels; other groups' weights are zero."""
    per_group, filters = channels // groups, weight.shape[0] // groups
    if groups == 1:
        return weight, 1
    join = next(
        (
            count
            for count in range(1, groups + 1)
            if groups % count == 0
            and count * per_group % LANES == 0
            and count * filters % LANES == 0
        ),
        groups,
    )
    if join == 1:
        return weight, groups
    merged: Array = np.zeros((weight.shape[0], per_group * join, *weight.shape[2:]), weight.dtype)
    for group in range(groups):
        rows = slice(group * filters, (group + 1) * filters)
        first = group % join * per_group
        merged[rows, first : first + per_group] = weight[rows]
    return merged, groups // join
