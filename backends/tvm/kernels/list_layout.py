"""How the numbers in a kernel's lists follow from which weights are kept."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.emit import Array

PAIR_LISTS = 3
"""Lists of a pair of filters: of places where both have weights, the first alone, the second."""


@dataclass(frozen=True)
class ListLayout:
    """Lists of places, each of them given to the kernel as a distance.

    The places of a list are numbered by channel, then by tap; a list has them in that order.

    Attributes:
        taps: distance of each tap of a channel.
        stride: distance from a channel to the next.
        channels: channels that a list may name.
        step: lists are filled up to a multiple of so many entries, with distance 0.
        paired: whether every third list, from the first on, has each of its places twice.
    """

    taps: tuple[int, ...]
    stride: int
    channels: int
    step: int = 1
    paired: bool = False

    @property
    def places(self) -> int:
        """Places that a list may name."""
        return self.channels * len(self.taps)

    def distances(self) -> NDArray[np.int64]:
        """Distance of each place of a list."""
        rows = np.arange(self.channels, dtype=np.int64) * self.stride
        return (rows[:, None] + np.array(self.taps, np.int64)).reshape(-1)

    def positions(self, distance: Array, start: Array) -> NDArray[np.int64] | None:
        """Which places of all lists, one list after the other, are named.

        Args:
            distance: entries of all lists.
            start: first entry of each list, and the end of the last.

        Returns:
            Ascending numbers; None where the arrays are no lists of this layout.
        """
        lists, number = self._lists(start)
        if distance.size < lists.size:
            return None
        entries = np.asarray(distance[: lists.size], np.int64)
        kept = np.ones(lists.size, np.bool_)
        if self.step > 1:
            kept[1:] = (entries[1:] > entries[:-1]) | (number[1:] == 0)
        if self.paired:
            kept &= (lists % PAIR_LISTS != 0) | (number % 2 == 0)
        table = self.distances()
        order = np.argsort(table, kind="stable")
        found = order[np.searchsorted(table[order], entries[kept]).clip(0, table.size - 1)]
        positions = lists[kept] * self.places + found
        again = self.arrays(positions, len(start) - 1)
        same = np.array_equal(again[0], entries) and np.array_equal(again[1], start)
        ascending = bool((np.diff(positions) > 0).all())
        return positions if same and ascending and not distance[lists.size :].any() else None

    def arrays(
        self, positions: NDArray[np.int64], lists: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The distances and starts that positions stand for.

        Args:
            positions: what `positions` gave.
            lists: how many lists there are.
        """
        list_, place = positions // self.places, positions % self.places
        distances = self.distances()[place]
        if self.paired:
            times = np.where(list_ % PAIR_LISTS == 0, 2, 1)
            list_, distances = np.repeat(list_, times), np.repeat(distances, times)
        counts = np.bincount(list_, minlength=lists)
        lengths = -(-counts // self.step) * self.step
        start = np.concatenate([[0], np.cumsum(lengths)])
        found = np.zeros(int(start[-1]), np.int64)
        first = np.concatenate([[0], np.cumsum(counts)])[list_]
        found[start[list_] + np.arange(list_.size) - first] = distances
        return found, start

    @staticmethod
    def _lists(start: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The list of each entry, and its number in it."""
        lengths = np.diff(start).astype(np.int64)
        lists = np.repeat(np.arange(lengths.size, dtype=np.int64), lengths)
        return lists, np.arange(lists.size) - np.asarray(start, np.int64)[lists]
