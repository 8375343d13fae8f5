"""Channels through convolutions and linear maps."""

import math

import numpy as np
import torch
from torch import Tensor, fx

from shohin.passes.analyses.operators import (
    WeightedOperation,
    pads_with_zeros,
    weighted_operation,
)
from shohin.passes.channels.arguments import set_argument
from shohin.passes.channels.flow import Channels, Edit, Layer
from shohin.passes.channels.pointwise import unknown
from shohin.passes.channels.slots import Flags, Indices
from shohin.passes.channels.tracer import Tracer
from shohin.passes.patterns import NoMatch
from shohin.passes.remarks import Reason


def trace_layer(node: fx.Node, tracer: Tracer) -> Channels | NoMatch:
    """A convolution or linear map: new channels, or those of its input when it is depthwise.

    An output is constant when it reads constants alone, or nothing. At the border of an image a
    padded convolution reads zeros beside a constant, so there only zeros count as constants.
    """
    operation = weighted_operation(node)
    if operation is None:
        return NoMatch(Reason.NOT_CONSTANT, "its weight is computed")
    parts = (operation.data, operation.weight, operation.bias)
    if any(source not in parts for source in tracer.tracked(node)):
        return NoMatch(Reason.NOT_CONSTANT, "its weight is computed")
    miss = tracer.obstacle(operation.weight, sparse=True) or tracer.obstacle(operation.bias)
    if miss is not None:
        return miss
    source = _source(operation, tracer)
    if isinstance(source, NoMatch):
        return source
    if operation.groups == 1:
        return _trace_dense(operation, source, tracer)
    if _is_depthwise(operation, tracer):
        return _trace_depthwise(operation, source, tracer)
    detail = f"it has {operation.groups} groups of channels"
    return NoMatch(Reason.UNSUPPORTED_OPERATOR, detail)


def as_matrix(operation: WeightedOperation, weight: Tensor) -> Tensor:
    """The weight of an operation without groups as `[outputs, inputs, taps]`."""
    turned = weight.transpose(0, 1) if operation.transposed else weight
    return turned.reshape(*turned.shape[:2], math.prod(turned.shape[2:]))


def row_axis(operation: WeightedOperation) -> int:
    """The axis of the weight on which its outputs lie; of 0 and 1 the other has its inputs."""
    return 1 if operation.transposed else 0


def _source(operation: WeightedOperation, tracer: Tracer) -> Channels | NoMatch:
    """The channels of an operation's input; ones that have to stay where they are not known."""
    data, shape = operation.data, tracer.shape(operation.data)
    axis = len(shape) - 1 if operation.linear else 1
    if not operation.linear and len(shape) != tracer.weight(operation.weight).dim():
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "its input has no batch axis")
    found = tracer.channels.get(data)
    if found is not None and found.axis == axis:
        return found
    if found is not None:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it works along an axis beside the channels")
    slots = tracer.slots.fresh(shape[axis])
    what = "an input of the program" if data.op == "placeholder" else f"of {data.name}"
    tracer.pin(slots, Reason.NOT_APPLICABLE, f"the channels are {what} and keep their number")
    return Channels(axis, slots, unknown(shape[axis]))


def _trace_dense(operation: WeightedOperation, source: Channels, tracer: Tracer) -> Channels:
    matrix = as_matrix(operation, tracer.weight(operation.weight))
    connected = (matrix != 0).any(2) if matrix.shape[2] != 1 else matrix[:, :, 0] != 0
    exact = operation.linear or not pads_with_zeros(operation)
    foldable = ~source.values.isnan() if exact else source.values == 0
    outputs = tracer.slots.fresh(matrix.shape[0])
    _cut(operation, source, outputs, tracer)
    tracer.add_layer(
        Layer(operation, source.slots, outputs, source.values, connected, foldable.numpy())
    )
    varies = connected[:, ~foldable].any(1)
    values = _constants(operation, matrix, source.values, ~varies, tracer)
    return Channels(source.axis, outputs, values)


def _constants(
    operation: WeightedOperation, matrix: Tensor, inputs: Tensor, rows: Tensor, tracer: Tracer
) -> Tensor:
    """What the outputs of some rows are when all inputs that they read are constants."""
    found = unknown(matrix.shape[0])
    read = inputs.nan_to_num() != 0
    chosen = matrix[rows][:, read].double().sum(2) @ inputs[read]
    bias = 0.0 if operation.bias is None else tracer.weight(operation.bias).double()[rows]
    found[rows] = chosen + bias
    return found.masked_fill(~found.isfinite(), torch.nan)


def _cut(operation: WeightedOperation, source: Channels, outputs: Indices, tracer: Tracer) -> None:
    rows = row_axis(operation)
    tracer.cut(operation.weight, rows, outputs, operation.node)
    tracer.cut(operation.weight, 1 - rows, source.slots, operation.node)
    if operation.bias is not None:
        tracer.cut(operation.bias, 0, outputs, operation.node)


def _is_depthwise(operation: WeightedOperation, tracer: Tracer) -> bool:
    weight = tracer.weight(operation.weight)
    inputs = tracer.shape(operation.data)[1]
    return not operation.transposed and weight.shape[1] == 1 and operation.groups == inputs


def _trace_depthwise(operation: WeightedOperation, source: Channels, tracer: Tracer) -> Channels:
    """One or more outputs for every input, which stay or go with it."""
    weight = tracer.weight(operation.weight).double()
    multiplier = weight.shape[0] // operation.groups
    outputs = np.repeat(source.slots, multiplier)
    tracer.cut(operation.weight, 0, outputs, operation.node)
    if operation.bias is not None:
        tracer.cut(operation.bias, 0, outputs, operation.node)

    def apply(kept: Flags) -> None:
        set_argument(operation.node, "groups", int(kept[source.slots].sum()))

    tracer.edit(Edit(operation.node, source.slots, apply))
    taps, inputs = weight.flatten(1), source.values.repeat_interleave(multiplier)
    exact = not pads_with_zeros(operation)
    constant = ~inputs.isnan() if exact else inputs == 0
    silent = ~(taps != 0).any(1)
    bias = torch.zeros(len(taps)) if operation.bias is None else tracer.weight(operation.bias)
    values = torch.where(silent, 0.0, inputs.nan_to_num() * taps.sum(1)) + bias.double()
    return Channels(source.axis, outputs, values.masked_fill(~(constant | silent), torch.nan))
