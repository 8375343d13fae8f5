"""Lists of weights: where their entries lie, and how they are shared out among work items."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.emit import Array

GROUP_WEIGHTS = 4096
"""Weights of a work item: enough to outweigh its start, few enough to share out evenly."""

Counts = NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class Lists:
    """Lists one behind the other, each filled up to whole steps.

    Attributes:
        counts: entries of each list.
        step: entries of a step.
    """

    counts: Counts
    step: int

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Places of each list."""
        return np.asarray(-(-self.counts // self.step) * self.step, np.int64)

    @cached_property
    def start(self) -> NDArray[np.int32]:
        """First place of each list, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def places(self, lists: Counts) -> NDArray[np.int64]:
        """Where entries go.

        Args:
            lists: the list of each entry, in order; of a list that occurs, every entry does.
        """
        first_of_list = np.searchsorted(lists, lists)
        return np.arange(lists.size, dtype=np.int64) - first_of_list + self.start[lists]


def filled_entries(counts: Counts, step: int) -> int:
    """Entries of lists that are filled up to whole steps.

    Args:
        counts: entries of each list.
        step: entries of a step.
    """
    return int(Lists(counts, step).lengths.sum())


def even_groups(weights: Counts, groups: int) -> Array:
    """First output of each group and the end, with about equally many weights between."""
    work = np.cumsum(np.asarray(weights, np.int64) + 4)
    bounds = [int(np.searchsorted(work, work[-1] * g / groups)) for g in range(1, groups)]
    return np.array([0, *bounds, len(weights)], np.int32)
