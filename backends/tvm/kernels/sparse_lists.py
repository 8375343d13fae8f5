"""Weights of a convolution as lists, in the order in which its kernel reads them."""

import numpy as np
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.emit import Array
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.groups import even_groups
from shohin.backends.tvm.kernels.list_layout import PAIR_LISTS, ListLayout
from shohin.backends.tvm.kernels.planes import Planes


def pack_lists(weight: Array, layout: ListLayout, groups: int, narrow: bool) -> dict[str, Array]:
    """Values and distances of weights, where lists start, and groups of about equal work.

    Lists are in the order of chunks, then of filters. Those of a pair are `PAIR_LISTS`; where both
    filters have weights, the two stand side by side.

    Args:
        weight: ``[O, C, KH, KW]``; zeros are left out.
        layout: of the lists; those of the last channels may have fewer.
        groups: of filters that are separate work items.
        narrow: whether distances take 16 bits.
    """
    filters, channels, rows, columns = weight.shape
    units = filters // 2 if layout.paired else filters
    lists = units * PAIR_LISTS if layout.paired else units
    places = layout.distances().reshape(layout.channels, -1)
    by_channel = np.moveaxis(weight, 0, 1).reshape(channels, filters, rows * columns)
    values, distances, counts = [], [], []
    for first in range(0, channels, layout.channels):
        part = by_channel[first : first + layout.channels].transpose(1, 0, 2)
        filter_, channel, tap = np.nonzero(part)
        list_ = _list_of(part, (filter_, channel, tap), layout)
        order = np.lexsort((filter_, tap, channel, list_))
        values.append(part[filter_, channel, tap][order])
        distances.append(places[channel, tap][order])
        counts.append(np.bincount(list_, minlength=lists))
    start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    weights_of = np.count_nonzero(weight.reshape(units, -1), axis=1)
    width = np.uint16 if narrow else np.int32
    return {
        "value": _at_least_one(np.concatenate(values).astype(np.float32)),
        "distance": _at_least_one(np.concatenate(distances).astype(width)),
        "start": start.astype(np.int32),
        "group": even_groups(weights_of, groups),
    }


def tap_places(geometry: Geometry, planes: Planes) -> NDArray[np.int64]:
    """Distance, in vectors, of each tap's pixel from the output's pixel in the first phase."""
    places = []
    down, right = geometry.stride
    for tap_row in range(geometry.kernel[0]):
        for tap in range(geometry.kernel[1]):
            row = tap_row * geometry.dilation[0] - geometry.padding[0]
            column = tap * geometry.dilation[1] - geometry.padding[2]
            phase = row % down * right + column % right
            places.append(phase * planes.plane + planes.at(row // down, column // right))
    return np.array(places, np.int64)


def _list_of(
    part: Array, found: tuple[NDArray[np.int64], ...], layout: ListLayout
) -> NDArray[np.int64]:
    """The list that each weight of a chunk belongs to."""
    filter_, channel, tap = found
    if not layout.paired:
        return filter_
    both = part[filter_ ^ 1, channel, tap] != 0
    return np.asarray(filter_ // 2 * PAIR_LISTS + np.where(both, 0, 1 + filter_ % 2))


def _at_least_one(array: Array) -> Array:
    return array if array.size else np.zeros(1, array.dtype)
