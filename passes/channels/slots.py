"""Numbered slots for channels, joined where channels can only stay or go together."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Indices: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]


class Slots:
    """Disjoint sets of slots.

    A slot stands for one channel of one or more tensors. Slots of one set are kept or removed
    together, as those of the two sides of an addition.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []

    def __len__(self) -> int:
        return len(self._parents)

    def fresh(self, count: int) -> Indices:
        """New slots, each in a set of its own."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return np.arange(first, first + count, dtype=np.int64)

    def join(self, one: Indices, two: Indices) -> None:
        """Join the slots of two arrays of equal length, one by one."""
        if np.array_equal(one, two):
            return
        for left, right in zip(one.tolist(), two.tolist(), strict=True):
            first, second = sorted((self._find(left), self._find(right)))
            self._parents[second] = first

    def roots(self) -> Indices:
        """For each slot the least slot of its set."""
        return np.array([self._find(slot) for slot in range(len(self._parents))], dtype=np.int64)

    def _find(self, slot: int) -> int:
        parents = self._parents
        while parents[slot] != slot:
            parents[slot] = parents[parents[slot]]
            slot = parents[slot]
        return slot
