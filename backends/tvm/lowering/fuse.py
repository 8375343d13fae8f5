"""Fusion: element-wise steps move into the operation that computes what they read."""

from collections import Counter

from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.lowering.operations import (
    BatchedMatMul,
    Convolution,
    Elementwise,
    FixedConvolution,
    FixedLinear,
    FusedStep,
    Linear,
    Operation,
    Operations,
    Value,
    WindowCopy,
)
from shohin.backends.tvm.lowering.values import dtype_text

_HOSTS = (Convolution, FixedConvolution, Linear, FixedLinear, BatchedMatMul, Elementwise)
_SWAPPED = {
    "add": "add",
    "multiply": "multiply",
    "maximum": "maximum",
    "minimum": "minimum",
    "subtract": "subtract-from",
    "subtract-from": "subtract",
    "fixed-add": "fixed-add",
    "fixed-multiply": "fixed-multiply",
}


def fuse(operations: Operations) -> Operations:
    """Merge element-wise chains into their producers, and slices into paddings.

    A producer is taken only when nothing else reads its result. It moves to the place of the
    merged operation, because a second operand may be computed between the two.
    """
    uses = Counter(value for op in operations.operations for value in op.reads)
    uses.update(operations.outputs)
    order: dict[Value, int] = {}
    producers: dict[Value, Operation] = {}
    kept: dict[int, Operation] = {}
    for position, op in enumerate(operations.operations):
        if isinstance(op, Elementwise):
            _prefer_later_operand(op, producers, order, uses)
        host = producers.get(op.inputs[0]) if op.inputs else None
        if host is not None and uses[host.output] == 1 and _merge(host, op):
            del kept[order[host.output]]
            host.output = op.output
            op = host
        kept[position] = op
        for value in op.outputs:
            producers[value] = op
            order[value] = position
    return Operations(operations.inputs, operations.outputs, [kept[i] for i in sorted(kept)])


def _prefer_later_operand(
    op: Elementwise,
    producers: dict[Value, Operation],
    order: dict[Value, int],
    uses: Counter[Value],
) -> None:
    """Start the chain from the operand that can take the step in, or is computed last."""
    first = op.steps[0]
    other = first.operand
    if first.step.operand != "full" or other is None or first.step.kind not in _SWAPPED:
        return

    def rank(value: Value) -> tuple[bool, bool, int]:
        producer = producers.get(value)
        hosts = isinstance(producer, _HOSTS) and uses[value] == 1
        return hosts, not isinstance(producer, Elementwise), order.get(value, -1)

    if rank(other) > rank(op.x):
        op.steps[0] = FusedStep(_swapped(first.step, op.x), op.x)
        op.x = other


def _swapped(step: Step, operand: Value) -> Step:
    """The step that does the same with its operands exchanged."""
    numbers = step.constants
    if step.kind == "fixed-add":
        numbers = (numbers[1], numbers[0], *numbers[2:])
    return Step(_SWAPPED[step.kind], numbers, "full", dtype_text(operand.dtype))


def _merge(host: Operation, op: Operation) -> bool:
    """Merge `op`, which reads the result of `host`, into `host`; False if it cannot be."""
    if isinstance(op, Elementwise) and isinstance(host, _HOSTS):
        return _merge_steps(host, op)
    if isinstance(op, WindowCopy) and isinstance(host, WindowCopy):
        return _merge_windows(host, op)
    return False


def _merge_steps(host: Operation, op: Elementwise) -> bool:
    channel = any(step.step.operand == "channel" for step in op.steps)
    matrix = isinstance(host, (Linear, FixedLinear, BatchedMatMul))
    if channel and matrix and len(op.output.shape) == 4:
        return False
    host.steps.extend(op.steps)
    kinds = "+".join(step.step.kind for step in op.steps)
    host.label = f"{host.label} +{kinds}"
    return True


def _merge_windows(host: WindowCopy, op: WindowCopy) -> bool:
    """Compose two windows where the composed bounds say the same as both in turn."""
    source, middle, result = host.x.shape[1:], host.output.shape[1:], op.output.shape[1:]
    inner_steps, outer_steps = (1, *host.step), (1, *op.step)
    pads = False
    for axis in range(3):
        last = op.start[axis] + (result[axis] - 1) * outer_steps[axis]
        contained = op.start[axis] >= 0 and last < middle[axis]
        identity = host.start[axis] == 0 and inner_steps[axis] == 1 and middle[axis] == source[axis]
        if not contained and not identity:
            return False
        reach = host.start[axis] + (middle[axis] - 1) * inner_steps[axis]
        pads = pads or host.start[axis] < 0 or reach >= source[axis]
    if pads and host.value != op.value:
        return False
    starts = [op.start[axis] * inner_steps[axis] + host.start[axis] for axis in range(3)]
    host.start = (starts[0], starts[1], starts[2])
    host.step = (inner_steps[1] * outer_steps[1], inner_steps[2] * outer_steps[2])
    host.value = op.value
    return True
