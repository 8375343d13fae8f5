"""Remove neurons and channels without inputs or without outputs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import fx

from shohin.ir.program import Fact, Program
from shohin.passes.analyses.cost import OperationCost, cost
from shohin.passes.analyses.operators import WEIGHTED
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.channels.discover import trace_channels
from shohin.passes.channels.flow import Flow, Layer, Pin
from shohin.passes.channels.marking import LIVE, Marks, mark
from shohin.passes.channels.slots import Flags, Indices
from shohin.passes.channels.surgery import remove_channels
from shohin.passes.remarks import Reason


def _excluded(flow: Flow, context: Context) -> tuple[Pin, ...]:
    """The slots for which a node would have to be changed that may not be."""
    return tuple(
        Pin(slots, Reason.EXCLUDED_BY_OPTION, f"{node.name} may not be changed")
        for node, needed in flow.sites().items()
        if not context.allows(node.name)
        for slots in needed
    )


def _changed_sites(flow: Flow, kept: Flags) -> set[fx.Node]:
    sites = flow.sites().items()
    return {node for node, needed in sites if not all(kept[slots].all() for slots in needed)}


def _describe(node: fx.Node, flow: Flow, layer: Layer | None, kept: Flags, folded: int) -> str:
    """``88 of 300 outputs and 4 of 784 inputs removed``."""
    if layer is None:
        return f"{_count(flow.channels[node].slots, kept)} channels removed"
    sides = {"outputs": layer.outputs, "inputs": layer.inputs}
    parts = [f"{_count(slots, kept)} {side}" for side, slots in sides.items() if _any(slots, kept)]
    noun = "constant" if folded == 1 else "constants"
    taken = f", {folded} {noun} folded into the bias" if folded else ""
    return f"{' and '.join(parts)} removed{taken}"


def _count(slots: Indices, kept: Flags) -> str:
    return f"{int((~kept[slots]).sum())} of {len(slots)}"


def _any(slots: Indices, kept: Flags) -> bool:
    return not bool(kept[slots].all())


def _remark_changes(
    program: Program,
    flow: Flow,
    marks: Marks,
    folded: dict[fx.Node, int],
    context: Context,
    before: dict[str, OperationCost],
) -> None:
    changed, after = _changed_sites(flow, marks.kept), cost(program).nodes
    layers = {layer.operation.node: layer for layer in flow.layers}
    for node in (node for node in program.graph.nodes if node in changed):
        context.changed(
            node,
            "removed",
            _describe(node, flow, layers.get(node), marks.kept, folded.get(node, 0)),
            before=before[node.name].for_remark(),
            after=after[node.name].for_remark(),
        )


def _remark_rest(
    program: Program, flow: Flow, marks: Marks, changed: set[fx.Node], context: Context
) -> None:
    """Say of convolutions and linear maps which channels had to stay, and why."""
    layers = {layer.operation.node: layer for layer in flow.layers}
    for node in (node for node in program.graph.nodes if node.target in WEIGHTED):
        if node in flow.refusals:
            context.skipped(node, *flow.refusals[node])
            continue
        reasons = list(_leftovers(flow, layers[node], marks)) if node in layers else []
        for reason, detail in reasons:
            context.skipped(node, reason, detail)
        if not reasons and node not in changed:
            detail = "each of its channels depends on an input and is read"
            context.skipped(node, Reason.NOT_APPLICABLE, detail)


def _leftovers(flow: Flow, layer: Layer, marks: Marks) -> Iterator[tuple[str, str]]:
    """Why channels stay that have no inputs, or that a layer does not read."""
    constant = ~flow.channels[layer.operation.node].values.isnan().numpy()
    unread = ~layer.connected.any(0).numpy()
    yield from _reasons(layer.outputs, constant, "outputs are constant", marks)
    yield from _reasons(layer.inputs, unread, "inputs are not read", marks)


def _reasons(slots: Indices, flags: Flags, what: str, marks: Marks) -> Iterator[tuple[str, str]]:
    candidates = slots[flags & marks.kept[slots]]
    causes, counts = np.unique(marks.causes[candidates], return_counts=True)
    for cause, count in zip(causes.tolist(), counts.tolist(), strict=True):
        reason, detail = marks.reasons[cause]
        if (reason, detail) == LIVE:
            reason, detail = Reason.OTHER_USERS, "but others that go with them are needed"
        yield str(reason), f"{count} of {len(slots)} {what}: {detail}"


@dataclass(frozen=True, kw_only=True)
class RemoveDead(Pass):
    """Remove neurons and channels that have no inputs, or that nothing reads.

    What pruning leaves behind (Han et al., arXiv 1506.02626, section 3.5): a neuron whose incoming
    weights are all zero gives a constant, one whose outgoing weights are all zero changes nothing.
    Both go, with the weights on their other side, and so do those that are left without inputs or
    readers by that, to the end. The constant is computed through what lies between (batch
    normalisation, activation, pooling, flattening) and added to the biases of its readers. A padded
    convolution sees zeros at its border, so that a constant before it goes only if it is zero.

    Channels that are added up, concatenated or multiplied go together or not at all; sparse
    weights keep what is left of their masks. Inputs and outputs of the program keep their
    shapes, and of every tensor one channel stays. Results are the same but for rounding, given
    that activations are finite. Before, with rows 1 and 2 of ``fc1.weight`` zero, and column 3 of
    ``fc2.weight``::

        %linear: float32[N,4] = aten.linear(%x, @fc1.weight, @fc1.bias)
        %relu: float32[N,4] = aten.relu(%linear)
        %linear_1: float32[N,2] = aten.linear(%relu, @fc2.weight, @fc2.bias)

    After, with ``fc2.weight[:, 1:3] relu(fc1.bias[1:3])`` added to ``fc2.bias``::

        %linear: float32[N,1] = aten.linear(%x, @fc1.weight, @fc1.bias)
        %relu: float32[N,1] = aten.relu(%linear)
        %linear_1: float32[N,2] = aten.linear(%relu, @fc2.weight, @fc2.bias)
    """

    name: ClassVar[str] = "remove-dead"
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})

    def run(self, program: Program, context: Context) -> PassResult:
        """Remove every channel that can be removed exactly."""
        changed: set[fx.Node] = set()
        while True:
            flow = trace_channels(program)
            marks = mark(flow, _excluded(flow, context))
            if marks.kept.all():
                _remark_rest(program, flow, marks, changed, context)
                return PassResult(program, modified=bool(changed))
            # What is left may have become simpler: a depthwise convolution of one channel is a
            # plain one, whose outputs need not go together.
            before = dict(context.analyses.get(cost, program).nodes)
            encodings, folded = remove_channels(program, flow, marks.kept, context.pass_name)
            context.analyses.clear()
            program = replace(program, encodings=encodings)
            _remark_changes(program, flow, marks, folded, context, before)
            changed |= _changed_sites(flow, marks.kept)
