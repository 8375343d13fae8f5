"""Which images are computed straight into their place in a concatenation.

A blocked image of whole blocks of channels is a run of memory inside of the image it is joined
to. Its producer can write there, and the concatenation itself is then nothing to do.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from shohin.backends.tvm.kernels.emit import LANES, blocks
from shohin.backends.tvm.lowering.operations import (
    Concatenation,
    Convolution,
    ConvolutionPair,
    FixedConvolution,
    GlobalAveragePooling,
    Operation,
    Operations,
    Pooling,
    Value,
    WindowCopy,
)

_STRIDED = (Convolution, ConvolutionPair, FixedConvolution, Pooling)
"""Operations whose kernels can leave room between images, for what is joined to them."""

_BLOCKED = (*_STRIDED, GlobalAveragePooling, WindowCopy)


@dataclass(frozen=True)
class Slice:
    """Where a part lies in the image it is joined to.

    Attributes:
        whole: result of the concatenation.
        block: first block of channels.
    """

    whole: Value
    block: int


def find_slices(operations: Operations) -> dict[Value, Slice]:
    """The parts of concatenations that can be written in place, and where.

    All parts of a concatenation are in place or none is. With several images a part is not one
    run of memory but one for each image: its producer must be able to leave room between them, and
    nothing else may read the part.
    """
    producers = {op.output: op for op in operations.operations}
    reads = Counter(value for op in operations.operations for value in op.reads)
    reads.update(operations.outputs)
    slices: dict[Value, Slice] = {}
    for op in operations.operations:
        if not isinstance(op, Concatenation) or not _joins_blocks(op):
            continue
        if all(_fits(part, op, producers, reads, slices) for part in op.parts):
            start = 0
            for part in op.parts:
                slices[part] = Slice(op.output, start)
                start += blocks(part.shape[1])
    return slices


def _joins_blocks(op: Concatenation) -> bool:
    numbers = op.output.fixed or op.output.dtype == torch.float32
    image = len(op.output.shape) == 4 and numbers
    return image and op.axis == 1 and all(part.shape[1] % LANES == 0 for part in op.parts[:-1])


def _fits(
    part: Value,
    op: Concatenation,
    producers: dict[Value, Operation],
    reads: "Counter[Value]",
    slices: dict[Value, Slice],
) -> bool:
    if part in slices or op.parts.count(part) > 1:
        return False
    producer = producers.get(part)
    if isinstance(producer, Convolution) and producer.may_be_sparse:
        return False
    if part.shape[0] > 1:
        return isinstance(producer, _STRIDED) and reads[part] == 1
    if isinstance(producer, Concatenation):
        return all(_is_part(inner, producer.output, slices) for inner in producer.parts)
    return isinstance(producer, _BLOCKED)


def _is_part(value: Value, whole: Value, slices: dict[Value, Slice]) -> bool:
    return value in slices and slices[value].whole is whole
