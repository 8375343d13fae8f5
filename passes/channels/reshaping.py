"""Channels through operators that only give a tensor another shape, or turn its axes."""

import math

import numpy as np
from torch import fx

from shohin.passes.channels.arguments import set_argument
from shohin.passes.channels.flow import Channels, Edit
from shohin.passes.channels.slots import Flags
from shohin.passes.channels.tracer import Tracer
from shohin.passes.patterns import NoMatch, argument
from shohin.passes.remarks import Reason

_SIZES = ("size", "shape")


def trace_reshape(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """A view of the same elements in the same order.

    The axis of the channels stays, or stays the last, or the channels and all axes behind them
    become one axis, on which every pixel of a channel has the slot of the channel.
    """
    (source,) = tracer.tracked(node)
    found = _reshaped(tracer.channels[source], tracer.shape(source), tracer.shape(node))
    if found is None:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it splits or mixes the channels")
    name = next((one for one in _SIZES if argument(node, one) is not None), None)
    sizes = [] if name is None else argument(node, name)
    if name is None or sizes[found.axis] == -1:
        return found
    if not isinstance(sizes[found.axis], int):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "the size of its channels is computed")
    tracer.edit(_size_edit(node, name, found))
    return found


def trace_permutation(node: fx.Node, tracer: Tracer) -> Channels:
    """Axes in another order."""
    (source,) = tracer.tracked(node)
    found, rank = tracer.channels[source], len(tracer.shape(source))
    dims = argument(node, "dims")
    order = [*range(rank)] if dims is None else [axis % rank for axis in dims]
    if dims is None:
        one, two = (argument(node, name) % rank for name in ("dim0", "dim1"))
        order[one], order[two] = two, one
    return Channels(order.index(found.axis), found.slots, found.values)


def _reshaped(found: Channels, before: tuple[int, ...], after: tuple[int, ...]) -> Channels | None:
    axis, last = found.axis, len(after) - 1
    if before[: axis + 1] == after[: axis + 1]:
        return found
    if axis == len(before) - 1 and after[-1:] == before[-1:]:
        return Channels(last, found.slots, found.values)
    pixels = math.prod(before[axis + 1 :])
    if last == axis and before[:axis] == after[:axis]:
        values = found.values.repeat_interleave(pixels)
        return Channels(axis, np.repeat(found.slots, pixels), values)
    return None


def _size_edit(node: fx.Node, name: str, found: Channels) -> Edit:
    def apply(kept: Flags) -> None:
        sizes = list(argument(node, name))
        sizes[found.axis] = int(kept[found.slots].sum())
        set_argument(node, name, sizes)

    return Edit(node, found.slots, apply)
