"""Channels through operators that work element by element."""

import torch
from torch import Tensor, fx

from shohin.passes.analyses.normalisation import affine_of
from shohin.passes.analyses.operators import is_random
from shohin.passes.channels.flow import Channels
from shohin.passes.channels.tracer import Tracer
from shohin.passes.patterns import NoMatch, argument, weight_name
from shohin.passes.remarks import Reason

_MIXED = "its operands do not have the same channels on the same axis"


def unknown(size: int) -> Tensor:
    """Values of channels of which nothing is known."""
    return torch.full((size,), torch.nan, dtype=torch.float64)


def trace_same(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """An operator that gives its only tensor as it is, as dropout in inference mode does."""
    if is_random(node):
        return NoMatch(Reason.TRAINING_MODE, "it drops elements")
    return tracer.channels[tracer.tracked(node)[0]]


def trace_batch_norm(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """Batch normalisation: a channel of scale 0 is its shift, whatever comes in."""
    source = argument(node, "input")
    found = tracer.channels.get(source)
    if found is None or found.axis != 1 or tracer.tracked(node) != [source]:
        return NoMatch(Reason.NOT_APPLICABLE, "it does not normalise along the channels")
    affine = affine_of(node)
    if isinstance(affine, NoMatch):
        return affine
    vectors = [argument(node, name) for name in ("weight", "bias", "running_mean", "running_var")]
    given = [vector for vector in vectors if vector is not None]
    obstacles = [miss for vector in given if (miss := tracer.obstacle(vector))]
    if obstacles:
        return obstacles[0]
    for vector in given:
        tracer.cut(vector, 0, found.slots, node)
    moved = found.values * affine.scale + affine.shift
    values = torch.where(affine.scale == 0, affine.shift, moved)
    return Channels(found.axis, found.slots, values)


def trace_pointwise(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """An operator whose element `i` depends on the elements `i` of its operands alone.

    Channels of several operands stay or go together, and so do the elements of weights that are
    broadcast along the other axes only, as a gain `[channels, 1, 1]`.
    """
    shape, operands = tracer.shape(node), node.all_input_nodes
    tracked = tracer.tracked(node)
    behind = {len(tracer.shape(one)) - tracer.channels[one].axis for one in tracked}
    if len(behind) > 1:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, _MIXED)
    from_end = behind.pop()
    size = shape[-from_end]
    full = [one for one in tracked if tracer.shape(one)[-from_end] == size]
    if not full or tracer.dtype(node) != tracer.dtype(full[0]):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, _MIXED)
    found = tracer.channels[full[0]]
    for operand in (one for one in operands if one is not full[0]):
        miss = _join(node, operand, found, from_end, tracer)
        if miss is not None:
            return miss
    values = _evaluate(node, from_end, size, tracer)
    return Channels(len(shape) - from_end, found.slots, values)


def _join(
    node: fx.Node, operand: fx.Node, found: Channels, from_end: int, tracer: Tracer
) -> NoMatch | None:
    """Tie the channels of a further operand to those found, or say why that is impossible."""
    shape, size = tracer.shape(operand), len(found.slots)
    extent = shape[-from_end] if len(shape) >= from_end else 1
    if operand in tracer.channels:
        other = tracer.channels[operand]
        if extent == size:
            tracer.slots.join(found.slots, other.slots)
        else:
            tracer.pin(other.slots, Reason.NOT_APPLICABLE, f"{node.name} broadcasts it")
        return None
    if extent == 1:
        return None
    if weight_name(operand) is None:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, f"the channels of {operand.name} are not known")
    miss = tracer.obstacle(operand)
    if miss is None:
        tracer.cut(operand, len(shape) - from_end, found.slots, node)
    return miss


def _evaluate(node: fx.Node, from_end: int, size: int, tracer: Tracer) -> Tensor:
    """What the channels are where those of all operands are constants."""
    operands = node.all_input_nodes
    known = [one in tracer.channels or weight_name(one) is not None for one in operands]
    values = [tracer.channels[one].values for one in tracer.tracked(node)]
    varies = torch.stack([one.isnan().expand(size) for one in values]).any(0)
    if not all(known) or bool(varies.all()):
        return unknown(size)

    def value(source: fx.Node) -> Tensor:
        if source not in tracer.channels:
            weight = tracer.weight(source)
            return weight.double() if weight.is_floating_point() else weight
        sizes = [1] * len(tracer.shape(source))
        sizes[-from_end] = -1
        return tracer.channels[source].values.reshape(sizes)

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    rows = result.double().movedim(-from_end, 0).reshape(size, -1)
    varies |= (rows != rows[:, :1]).any(1) | ~rows.isfinite().all(1)
    constant: Tensor = rows[:, 0].masked_fill(varies, torch.nan)
    return constant
