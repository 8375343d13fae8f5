"""Exactly the largest of many scores, without a copy of them.

The bits of a non-negative floating-point number, read as an integer, order it among the others.
So the threshold is found digit by digit: count how often each value of the upper 16 bits occurs,
find where the wanted count falls, and go on with the next 16 bits of those that share this value.
That takes a pass over the scores for each digit (two for float32) and memory for one piece of
them, whether they are of one weight or of all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGIT = 16
_VALUES = 1 << _DIGIT


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the units of one weight.

    Attributes:
        count: number of units.
        pieces: gives the scores in order, as vectors, anew at each call. Scores are non-negative
            and not NaN; a negative one says that the unit may not be kept.
        wide: whether they are float64; otherwise float32 holds them exactly.
    """

    count: int
    pieces: Callable[[], Iterator[Tensor]]
    wide: bool = False


def keep_largest(pool: Sequence[Scores], count: int) -> list[Tensor]:
    """Choose the units of the largest scores.

    Args:
        pool: the scores that compete with each other.
        count: how many to keep; of equal scores the first, in the order of the pool.

    Returns:
        For each member of the pool, a bool vector that is true where a unit is kept. When fewer
        than `count` units may be kept, all of these are.
    """
    wide = any(scores.wide for scores in pool)
    if count <= 0:
        return [torch.zeros(scores.count, dtype=torch.bool) for scores in pool]
    threshold, ties = _threshold(pool, count, wide)
    masks = []
    for scores in pool:
        mask, ties = _mask(scores, wide, threshold, ties)
        masks.append(mask)
    return masks


def count_to_keep(density: float, count: int) -> int:
    """How many of some units a density keeps: at least one, since no weight is emptied."""
    return min(count, max(1, round(density * count)))


def keep_largest_of_each(pool: Sequence[Scores], count: int) -> list[Tensor]:
    """Choose the units of the largest scores, at least one of each member of the pool.

    The largest unit of every member is kept, and of all others as many as are left of the count.

    Args:
        pool: the scores that compete with each other.
        count: how many to keep; more only where the pool has more members.

    Returns:
        As of `keep_largest`.
    """
    masks = keep_largest(pool, count)
    single: dict[int, Tensor] = {}
    while True:
        empty = [i for i, mask in enumerate(masks) if i not in single and not mask.any()]
        if not empty:
            return masks
        single |= {i: keep_largest([pool[i]], 1)[0] for i in empty}
        others = [i for i in range(len(pool)) if i not in single]
        reserved = sum(int(mask.sum()) for mask in single.values())
        chosen = keep_largest([pool[i] for i in others], count - reserved)
        masks = [single.get(i, mask) for i, mask in enumerate(masks)]
        for i, mask in zip(others, chosen, strict=True):
            masks[i] = mask


def _keys(scores: Scores, wide: bool) -> Iterator[Tensor]:
    """The scores as integers of the same order."""
    for piece in scores.pieces():
        yield piece.double().view(torch.int64) if wide else piece.float().view(torch.int32)


def _threshold(pool: Sequence[Scores], count: int, wide: bool) -> tuple[int, int]:
    """The key above which every unit is kept, and how many units of exactly this key are, too."""
    prefix, left = 0, count
    width = 64 if wide else 32
    for shift in range(width - _DIGIT, -1, -_DIGIT):
        histogram = _histogram(pool, wide, shift, None if shift == width - _DIGIT else prefix)
        from_above = histogram.flip(0).cumsum(0)
        if int(from_above[-1]) < left:
            return -1, 0
        position = int(torch.searchsorted(from_above, left))
        left -= int(from_above[position - 1]) if position else 0
        prefix = prefix << _DIGIT | (_VALUES - 1 - position)
    return prefix, left


def _histogram(pool: Sequence[Scores], wide: bool, shift: int, prefix: int | None) -> Tensor:
    """How often each value of a digit occurs among the keys whose upper digits are the prefix."""
    histogram = torch.zeros(_VALUES, dtype=torch.int64)
    for keys in (keys for scores in pool for keys in _keys(scores, wide)):
        if prefix is not None:
            keys = keys[keys >> (shift + _DIGIT) == prefix]
        elif keys.numel() and int(keys.min()) < 0:
            keys = keys[keys >= 0]
        digits = (keys >> shift).bitwise_and_(_VALUES - 1)
        histogram += torch.bincount(digits, minlength=_VALUES)
    return histogram


def _mask(scores: Scores, wide: bool, threshold: int, ties: int) -> tuple[Tensor, int]:
    """The units above a threshold and the first of those at it; how many ties are left over."""
    mask = torch.empty(scores.count, dtype=torch.bool)
    start = 0
    for keys in _keys(scores, wide):
        part = mask[start : start + keys.numel()]
        torch.gt(keys, threshold, out=part)
        if ties:
            first = torch.nonzero(keys == threshold).flatten()[:ties]
            part[first] = True
            ties -= first.numel()
        start += keys.numel()
    return mask, ties
