"""Tracing the channels of a whole program, operator by operator."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import fx
from torch._ops import OpOverload

from shohin.ir.printer import format_target
from shohin.ir.program import Program
from shohin.passes.analyses.operators import WEIGHTED, is_random
from shohin.passes.channels.flow import Channels, Flow
from shohin.passes.channels.layers import trace_layer
from shohin.passes.channels.pointwise import trace_batch_norm, trace_pointwise, trace_same
from shohin.passes.channels.reshaping import trace_permutation, trace_reshape
from shohin.passes.channels.tracer import Tracer
from shohin.passes.channels.windows import (
    trace_concatenation,
    trace_mean,
    trace_padding,
    trace_pooling,
    trace_slice,
)
from shohin.passes.patterns import NoMatch, argument
from shohin.passes.remarks import Reason

_aten = torch.ops.aten
_Handler: TypeAlias = Callable[[fx.Node, Tracer], Channels | NoMatch]

_HANDLERS: Mapping[_Handler, tuple[OpOverload, ...]] = {
    trace_layer: tuple(WEIGHTED),
    trace_batch_norm: (_aten.batch_norm.default,),
    trace_same: (
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.dropout.default,
        _aten.feature_dropout.default,
    ),
    trace_pointwise: (_aten.hardswish.default, _aten.relu.default),
    trace_pooling: (
        _aten.adaptive_avg_pool1d.default,
        _aten.adaptive_avg_pool2d.default,
        _aten.adaptive_avg_pool3d.default,
        _aten.avg_pool1d.default,
        _aten.avg_pool2d.default,
        _aten.avg_pool3d.default,
        _aten.max_pool1d.default,
        _aten.max_pool2d.default,
        _aten.max_pool3d.default,
    ),
    trace_mean: (_aten.amax.default, _aten.amin.default, _aten.mean.dim),
    trace_padding: (_aten.constant_pad_nd.default, _aten.pad.default),
    trace_slice: (_aten.slice.Tensor,),
    trace_concatenation: (_aten.cat.default,),
    trace_permutation: (_aten.permute.default, _aten.transpose.int),
    trace_reshape: (
        _aten._unsafe_view.default,
        _aten.flatten.using_ints,
        _aten.reshape.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unsqueeze.default,
        _aten.view.default,
    ),
}
_BY_TARGET: Mapping[object, _Handler] = {
    target: handler for handler, targets in _HANDLERS.items() for target in targets
}


def trace_channels(program: Program) -> Flow:
    """Find which channels of a program's tensors and weights stay or go together.

    What an operator does to channels is known for convolutions, linear maps, batch normalisation,
    element-wise operators, pooling, means, padding, slices, concatenation and changes of shape.
    Channels that reach any other operator, or an output, have to stay.

    Args:
        program: a functional program; it is not changed.
    """
    tracer = Tracer(program)
    for node in program.graph.nodes:
        if node.op == "output":
            _pin(node, "is an output of the program and keeps its shape", tracer)
        elif node.op == "call_function" and (node.target in WEIGHTED or tracer.tracked(node)):
            _visit(node, tracer)
    return tracer.flow()


def _visit(node: fx.Node, tracer: Tracer) -> None:
    if _reads_other_size(node, tracer):
        return
    handler = _handler(node)
    if handler is None:
        found: Channels | NoMatch = NoMatch(
            Reason.UNSUPPORTED_OPERATOR, f"{format_target(node.target)} is not followed"
        )
    else:
        found = handler(node, tracer)
    if isinstance(found, Channels):
        tracer.channels[node] = found
        return
    if node.target in WEIGHTED:
        tracer.refusals[node] = (str(found.reason), found.detail)
    for source in tracer.tracked(node):
        slots = tracer.channels[source].slots
        tracer.pin(slots, found.reason, f"read by {node.name}: {found.detail}")


def _handler(node: fx.Node) -> _Handler | None:
    known = _BY_TARGET.get(node.target)
    if known is not None:
        return known
    tags = getattr(node.target, "tags", ())
    return trace_pointwise if torch.Tag.pointwise in tags and not is_random(node) else None


def _reads_other_size(node: fx.Node, tracer: Tracer) -> bool:
    """Whether a node only asks for the size of an axis beside that of the channels."""
    if node.target is not _aten.sym_size.int:
        return False
    (source,) = tracer.tracked(node)
    axis = argument(node, "dim") % len(tracer.shape(source))
    return bool(axis != tracer.channels[source].axis)


def _pin(node: fx.Node, why: str, tracer: Tracer) -> None:
    for source in tracer.tracked(node):
        detail = f"{source.name} {why}"
        tracer.pin(tracer.channels[source].slots, Reason.NOT_APPLICABLE, detail)
