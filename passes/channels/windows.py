"""Channels through operators that work on each channel by itself: pooling, means, padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from shohin.passes.channels.arguments import set_argument
from shohin.passes.channels.flow import Channels, Edit
from shohin.passes.channels.slots import Flags, Indices
from shohin.passes.channels.tracer import Tracer
from shohin.passes.patterns import NoMatch, argument
from shohin.passes.remarks import Reason

_POOLED = "it works along the channels"


def trace_pooling(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """Pooling over the last axes: a constant stays what it is, unless padded zeros count."""
    (source,) = tracer.tracked(node)
    found = tracer.channels[source]
    if found.axis >= len(tracer.shape(source)) - _pooled_axes(node):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, _POOLED)
    exact = argument(node, "divisor_override") is None and not _counts_padding(node)
    values = found.values if exact else _only_zeros(found.values)
    return Channels(found.axis, found.slots, values)


def _pooled_axes(node: fx.Node) -> int:
    """Number of pooled axes, from the operator's name: 2 for ``avg_pool2d``."""
    name: str = node.target._schema.name  # type: ignore[union-attr]
    return int(name[-2])


def _counts_padding(node: fx.Node) -> bool:
    """Whether padded zeros enter an average; a maximum leaves them out."""
    if not argument(node, "count_include_pad", False):
        return False
    padding = argument(node, "padding", 0)
    widths = padding if isinstance(padding, Sequence) else [padding]
    return any(width != 0 for width in widths)


def _only_zeros(values: Tensor) -> Tensor:
    return torch.where(values == 0, values, torch.nan)


def trace_mean(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """A mean or maximum over axes other than that of the channels."""
    (source,) = tracer.tracked(node)
    found, rank = tracer.channels[source], len(tracer.shape(source))
    given = argument(node, "dim")
    if given in (None, []) or tracer.dtype(node) != tracer.dtype(source):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, _POOLED)
    axes = {axis % rank for axis in (given if isinstance(given, Sequence) else [given])}
    if found.axis in axes:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, _POOLED)
    gone = 0 if argument(node, "keepdim", False) else sum(axis < found.axis for axis in axes)
    return Channels(found.axis - gone, found.slots, found.values)


def trace_padding(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """Padding: beside the channels it adds channels that are constants."""
    (source,) = tracer.tracked(node)
    found, widths = tracer.channels[source], argument(node, "pad")
    value = argument(node, "value")
    number = 0.0 if value is None else value
    if argument(node, "mode", "constant") != "constant" or not isinstance(number, (int, float)):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it does not pad with a constant")
    if not all(isinstance(width, int) and width >= 0 for width in widths):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it takes away what is at the border")
    first = 2 * (len(tracer.shape(source)) - 1 - found.axis)
    before, after = (*widths[first : first + 2], 0, 0)[:2]
    elsewhere = any(width for at, width in enumerate(widths) if at not in (first, first + 1))
    values = torch.where(found.values == number, found.values, torch.nan)
    inside = Channels(found.axis, found.slots, values if elsewhere else found.values)
    return (
        _add_channels(node, inside, (before, after), number, tracer) if before + after else inside
    )


def _add_channels(
    node: fx.Node, inside: Channels, counts: tuple[int, int], value: float, tracer: Tracer
) -> Channels:
    """The channels with new ones of a constant value on both sides."""
    left, right = (tracer.slots.fresh(count) for count in counts)
    position = 2 * (len(tracer.shape(node)) - 1 - inside.axis)

    def apply(kept: Flags) -> None:
        widths = list(argument(node, "pad"))
        widths[position : position + 2] = [int(kept[left].sum()), int(kept[right].sum())]
        set_argument(node, "pad", widths)

    slots = _concatenate([left, inside.slots, right])
    tracer.edit(Edit(node, _concatenate([left, right]), apply))
    filled = [torch.full((count,), float(value), dtype=torch.float64) for count in counts]
    return Channels(inside.axis, slots, torch.cat([filled[0], inside.values, filled[1]]))


def trace_slice(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """A slice of the channels, or of another axis."""
    (source,) = tracer.tracked(node)
    found, shape = tracer.channels[source], tracer.shape(source)
    bounds: list[Any] = [argument(node, name) for name in ("start", "end", "step")]
    if argument(node, "dim") % len(shape) != found.axis:
        return found
    if not all(bound is None or isinstance(bound, int) for bound in bounds) or bounds[2] != 1:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it takes channels that do not lie together")
    start, end, _ = slice(*bounds).indices(shape[found.axis])
    slots = found.slots

    def apply(kept: Flags) -> None:
        first = int(kept[slots[:start]].sum())
        set_argument(node, "start", first)
        set_argument(node, "end", first + int(kept[slots[start:end]].sum()))

    if (start, end) != (0, shape[found.axis]):
        tracer.edit(Edit(node, slots[:end], apply))
    elif bounds[1] is not None and bounds[1] < shape[found.axis]:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "its bounds count from the end")
    return Channels(found.axis, slots[start:end], found.values[start:end])


def trace_concatenation(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """Parts side by side: along the channels, or along another axis."""
    parts: Sequence[fx.Node] = argument(node, "tensors")
    tracked = [part for part in parts if part in tracer.channels]
    axes = {tracer.channels[part].axis for part in tracked}
    if len(axes) > 1 or any(part.op == "get_attr" for part in parts):
        return NoMatch(
            Reason.UNSUPPORTED_OPERATOR, "its parts differ in the axis of their channels"
        )
    axis = axes.pop()
    if argument(node, "dim", 0) % len(tracer.shape(node)) != axis:
        return _stack(parts, tracer)
    found = [_part(part, axis, tracer) for part in parts]
    slots = _concatenate([part.slots for part in found])
    return Channels(axis, slots, torch.cat([part.values for part in found]))


def _part(part: fx.Node, axis: int, tracer: Tracer) -> Channels:
    """The channels of a part; ones that have to stay where they are not understood."""
    if part in tracer.channels:
        return tracer.channels[part]
    size = tracer.shape(part)[axis]
    slots = tracer.slots.fresh(size)
    tracer.pin(slots, Reason.NOT_APPLICABLE, f"the channels of {part.name} are not known")
    return Channels(axis, slots, torch.full((size,), torch.nan, dtype=torch.float64))


def _stack(parts: Sequence[fx.Node], tracer: Tracer) -> Channels | NoMatch:
    """Parts with the same channels, joined along another axis."""
    if not all(part in tracer.channels for part in parts):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "the channels of some parts are not known")
    found = [tracer.channels[part] for part in parts]
    for other in found[1:]:
        tracer.slots.join(found[0].slots, other.slots)
    same = torch.stack([part.values == found[0].values for part in found]).all(0)
    values = torch.where(same, found[0].values, torch.nan)
    return Channels(found[0].axis, found[0].slots, values)


def _concatenate(parts: Sequence[Indices]) -> Indices:
    return np.concatenate(parts)
