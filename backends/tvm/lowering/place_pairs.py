"""Planning of convolutions that a 1 x 1 convolution alone reads: one kernel where it is faster."""

from collections import Counter
from dataclasses import replace

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_pair import ConvPair
from shohin.backends.tvm.kernels.conv_tiles import choose_tile
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.lowering.operations import (
    Convolution,
    ConvolutionPair,
    Operation,
    Operations,
    Value,
)
from shohin.backends.tvm.lowering.place_images import (
    dense_kernel,
    place_convolution,
    weight_places,
)
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.lowering.values import geometry_of, macs_of


def pair_convolutions(operations: Operations) -> Operations:
    """Take convolutions and the 1 x 1 convolutions that alone read them as pairs.

    Only where nothing comes between the two, as in layers of low rank: with an activation between
    them networks have many of them, and few would gain anything.
    """
    uses = Counter(value for op in operations.operations for value in op.reads)
    uses.update(operations.outputs)
    producers: dict[Value, Convolution] = {}
    kept: list[Operation] = []
    for op in operations.operations:
        first = producers.get(op.x) if isinstance(op, Convolution) else None
        if isinstance(op, Convolution) and first is not None and _reads_alone(op, first, uses):
            kept.remove(first)
            label = f"{first.label} + {op.label.partition(': ')[2]}"
            kept.append(ConvolutionPair(op.output, label, first, op, steps=op.steps))
            continue
        if isinstance(op, Convolution):
            producers[op.output] = op
        kept.append(op)
    return Operations(operations.inputs, operations.outputs, kept)


def _reads_alone(op: Convolution, first: Convolution, uses: Counter[Value]) -> bool:
    pointwise = op.weight.shape[2:] == (1, 1) and op.stride == (1, 1) and not any(op.padding)
    dense = not any(one.sparse or one.ternary for one in (first, op))
    plain = first.groups == op.groups == 1 and dense
    return pointwise and plain and not first.steps and uses[first.output] == 1


def place_pair(planner: Planner, op: ConvolutionPair) -> None:
    """Both convolutions in one kernel where that was measured to be faster, else one by one."""
    any_tiles = _kernel(planner, op)
    kernel = _faster(planner, op, any_tiles) if any_tiles.fits else None
    if kernel is None:
        for one in (op.first, op.second):
            place_convolution(planner, one, timed=any_tiles.fits)
        return
    arguments = [
        planner.image(op.first.x, plain=kernel.first.plain_input),
        *weight_places(planner, op.first, kernel.first),
        *weight_places(planner, op.second, kernel.second),
        *planner.operands(op, blocked=True, width=kernel.second.filters),
        planner.define_blocked(op.output),
    ]
    planner.call(kernel, arguments, op.label, macs_of(op.first) + macs_of(op.second))


def _faster(planner: Planner, op: ConvolutionPair, kernel: ConvPair) -> ConvPair | None:
    """The kernel of both, when it is known to be faster than two; a note says what was measured."""
    alone = [
        planner.choose(dense_kernel(planner, one), timed=True) for one in (op.first, op.second)
    ]
    both = planner.choose(kernel, timed=True)
    times = [planner.tuner.milliseconds(one) for one in (*alone, both)]
    known = [time for time in times if time is not None]
    if len(known) < len(times):
        return None
    apart, together = sum(known[:2]), known[2]
    text = f"measured: one by one {apart:.3f} ms, in one kernel {together:.3f} ms"
    for label in (op.label, op.first.label, op.second.label):
        planner.note(label, text)
    return both if together < apart else None


def _kernel(planner: Planner, op: ConvolutionPair) -> ConvPair:
    """The kernel of both, in any tiles."""
    first = dense_kernel(planner, op.first)
    second = replace(dense_kernel(planner, op.second), geometry=geometry_of(op.second))
    return ConvPair(_by_rows(planner, first, op.first), _by_rows(planner, second, op.second))


def _by_rows(planner: Planner, conv: Conv2d, op: Convolution) -> Conv2d:
    """The convolution over rows as they are, in a tile that is not cut for a cache."""
    geometry = geometry_of(op)
    filter_blocks = conv.filters // LANES
    tile = choose_tile(geometry.output_size[1], filter_blocks, planner.target.registers())
    return replace(conv, geometry=geometry, tile=tile)
