"""Ranges of channels made alike across layers, which changes nothing of what a network computes.

Where a convolution or linear map feeds another through a ReLU alone, an output channel of the first
can be divided by what the input channel of the second is multiplied with. With
``s = sqrt(r1 / r2)`` of the largest weights both sides get the same range (Nagel et al., "Data-Free
Quantization through Weight Equalization and Bias Correction", ICCV 2019, equation 11). The factors
are powers of two, so that not one bit of the results changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from shohin.ir.program import Program, readers, tensor_of, tied_names
from shohin.passes.analyses.operators import WeightedOperation, weighted_operation
from shohin.passes.fixed.forms import RELU
from shohin.passes.patterns import argument, single_user, weight_name
from shohin.passes.scaling import largest_of_channels, scale_channels

_SWEEPS = 10
_POOLING = torch.ops.aten.max_pool2d.default


@dataclass(frozen=True)
class Pair:
    """Two layers, the second of which alone reads the first.

    Attributes:
        first: the layer whose outputs are divided.
        second: the layer whose inputs are multiplied.
    """

    first: WeightedOperation
    second: WeightedOperation


def equalise(program: Program) -> list[Pair]:
    """Equalise the ranges of all pairs of layers, in place, again and again until nothing changes.

    Returns:
        The pairs whose ranges changed.
    """
    pairs = list(_pairs(program))
    changed: dict[int, Pair] = {}
    for _ in range(_SWEEPS):
        moved = [index for index, pair in enumerate(pairs) if _equalise_pair(program, pair)]
        changed |= {index: pairs[index] for index in moved}
        if not moved:
            break
    return [changed[index] for index in sorted(changed)]


def kept_by_encodings(program: Program) -> list[str]:
    """Weights of such pairs that stay as they are because they are stored in an encoding."""
    found: dict[str, None] = {}
    for pair in _neighbours(program):
        names = [weight_name(one.weight) for one in (pair.first, pair.second)]
        found |= {name: None for name in names if name is not None and name in program.encodings}
    return [*found]


def _pairs(program: Program) -> Iterator[Pair]:
    for pair in _neighbours(program):
        if all(_is_own(program, one) for one in (pair.first, pair.second)):
            yield pair


def _neighbours(program: Program) -> Iterator[Pair]:
    for node in program.graph.nodes:
        second = weighted_operation(node)
        first = None if second is None else _producer(second.data)
        if first is None or second is None or first.transposed or second.transposed:
            continue
        yield Pair(first, second)


def _producer(data: fx.Node) -> WeightedOperation | None:
    """The layer that computes a feature map, through a ReLU and maximum pooling alone."""
    node: object = data
    while isinstance(node, fx.Node) and single_user(node) is not None:
        found = weighted_operation(node)
        if found is not None:
            return found
        node = argument(node, "self") if node.target in (RELU, _POOLING) else None
    return None


def _is_own(program: Program, operation: WeightedOperation) -> bool:
    """Whether nothing else reads a layer's weight and bias, and they are stored as they are."""
    names = [weight_name(operation.weight)]
    if operation.bias is not None:
        names.append(weight_name(operation.bias))
    return all(name is not None and _is_plain_and_own(program, name) for name in names)


def _is_plain_and_own(program: Program, name: str) -> bool:
    tied = next(names for names in tied_names(program) if name in names)
    reading = [reader for one in tied for reader in readers(program, one)]
    return len(reading) == 1 and name not in program.encodings


def _equalise_pair(program: Program, pair: Pair) -> bool:
    one, two = (
        tensor_of(program.module, str(op.weight.target)) for op in (pair.first, pair.second)
    )
    ranges = largest_of_channels(pair.first, one.detach(), outputs=True)
    wanted = largest_of_channels(pair.second, two.detach(), outputs=False)
    factors = _factors(ranges, wanted)
    if bool((factors == 1).all()):
        return False
    with torch.no_grad():
        one.copy_(scale_channels(pair.first, one, 1 / factors, outputs=True))
        two.copy_(scale_channels(pair.second, two, factors, outputs=False))
        if pair.first.bias is not None:
            bias = tensor_of(program.module, str(pair.first.bias.target))
            bias.copy_(bias / factors)
    return True


def _factors(ranges: Tensor, wanted: Tensor) -> Tensor:
    """Powers of two near ``sqrt(r1 / r2)``; 1 for channels of zeros."""
    usable = (ranges > 0) & (wanted > 0)
    exponents = torch.where(usable, (ranges.log2() - wanted.log2()) / 2, 0.0).nan_to_num(0.0)
    return torch.exp2(exponents.round())
