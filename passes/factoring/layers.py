"""Which layers can be split, what follows them, and what they cost."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from shohin.ir.encodings import Dense
from shohin.ir.program import Program, encoding_of, readers
from shohin.passes.analyses.operators import WeightedOperation
from shohin.passes.analyses.shapes import Shapes
from shohin.passes.base import Context
from shohin.passes.factoring.factors import LayerShape
from shohin.passes.patterns import weight_name
from shohin.passes.pruning.candidates import (
    Candidate,
    gives_outputs,
    is_excluded,
    obstacle,
)
from shohin.passes.pruning.unfolding import Unfolding, can_unfold, unfolding_of
from shohin.passes.remarks import Reason

_RELU = frozenset({torch.ops.aten.relu.default, torch.ops.aten.relu_.default})
_SHAPE_ONLY = frozenset(
    {
        *(torch.ops.aten.view.default, torch.ops.aten.reshape.default),
        *(torch.ops.aten.flatten.using_ints, torch.ops.aten.dropout.default),
    }
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear map that may be split.

    Attributes:
        candidate: its weight.
        operation: the node that reads it, its parts named.
        unfolding: how its input becomes columns.
        shape: its sizes.
        rectified: whether nothing but ReLUs read its responses.
        follows: what reads them otherwise, for people.
    """

    candidate: Candidate
    operation: WeightedOperation
    unfolding: Unfolding
    shape: LayerShape
    rectified: bool
    follows: str = ""

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.candidate.name

    @property
    def node(self) -> fx.Node:
        """The node that reads it."""
        return self.operation.node

    @property
    def linear(self) -> bool:
        """Whether it is a linear map."""
        return self.operation.linear

    @property
    def weight(self) -> Tensor:
        """The weight, float64."""
        return self.candidate.weight.detach().double()

    @property
    def rows(self) -> Tensor:
        """The weight as a matrix, float64 `[outputs, inputs * height * width]`."""
        return self.weight.flatten(1)


@dataclass(frozen=True)
class Wanted:
    """Which layers may be split by the options.

    Attributes:
        exclude: names of weights, or shell patterns.
        spatial_only: whether only layers that can be split in height and width are wanted.
        most_outputs: outputs beyond which moments of all pairs of them are too many.
        named: names of weights that are wanted even if they give outputs of the program.
    """

    exclude: Collection[str] = ()
    named: Collection[str] = ()
    spatial_only: bool = False
    most_outputs: float = math.inf


def find_layers(
    program: Program,
    candidates: Collection[Candidate],
    layouts: Shapes,
    wanted: Wanted,
    context: Context,
) -> list[Layer]:
    """The layers that can be split, in data-flow order, with a remark on each of the others."""
    found = []
    for candidate in candidates:
        if is_excluded(candidate, wanted.exclude, context):
            continue
        if not context.allows(candidate.node.name):
            detail = f"{candidate.name} may not be changed"
            context.skipped(candidate.node, Reason.EXCLUDED_BY_OPTION, detail)
            continue
        reason = _obstacle(program, candidate, wanted)
        if reason is not None:
            context.skipped(candidate.node, *reason)
            continue
        found.append(_layer(candidate, layouts))
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda layer: order[layer.node])


def _shape_of(operation: WeightedOperation, weight: Tensor, layouts: Shapes) -> LayerShape:
    """The sizes of a convolution or linear map."""
    output = layouts.of(operation.node)
    outputs = weight.shape[0]
    positions = output.elements // outputs
    if operation.linear:
        return LayerShape(outputs, weight.shape[1], (1, 1), positions, positions, positions)
    data = layouts.of(operation.data)
    before = positions // max(1, output.shape[-1]) * data.shape[-1]
    kernel, pixels = (weight.shape[2], weight.shape[3]), data.elements // weight.shape[1]
    return LayerShape(outputs, weight.shape[1], kernel, positions, before, pixels)


def _layer(candidate: Candidate, layouts: Shapes) -> Layer:
    operation, weight = candidate.operations[0], candidate.weight
    readers = [*_readers(operation.node)]
    rectified = bool(readers) and all(reader.target in _RELU for reader in readers)
    return Layer(
        candidate,
        operation,
        unfolding_of(operation, weight),
        _shape_of(operation, weight, layouts),
        rectified,
        "" if rectified else _describe(readers),
    )


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads responses, through operators that only change their shape."""
    for user in node.users:
        if user.target in _SHAPE_ONLY:
            yield from _readers(user)
        else:
            yield user


def _describe(readers: Sequence[fx.Node]) -> str:
    """What reads responses where that is not ReLUs alone."""
    others = [node for node in readers if node.target not in _RELU]
    names = ["the output" if node.op == "output" else str(node.target) for node in others]
    return " and ".join(dict.fromkeys(name.removesuffix(".default") for name in names)) or "nothing"


def _obstacle(program: Program, candidate: Candidate, wanted: Wanted) -> tuple[Reason, str] | None:
    """Why a layer cannot be split, with a sentence about it; None when it can."""
    name, operation = candidate.name, candidate.operations[0]
    reason = obstacle(program, candidate)
    if reason is not None:
        return reason
    held, outputs = encoding_of(program, name), candidate.weight.shape[0]
    if not isinstance(held, Dense):
        return Reason.ALREADY_ENCODED, f"{name} is stored as {held.describe()}"
    if outputs > wanted.most_outputs:
        found = f"{name} has {outputs:,} outputs, expected at most {wanted.most_outputs:,}"
        return Reason.NOT_APPLICABLE, f"{found}: this solver needs moments of all pairs"
    if len(candidate.operations) > 1:
        nodes = ", ".join(one.node.name for one in candidate.operations)
        return Reason.OTHER_USERS, f"{name} is shared by {nodes}"
    if not can_unfold(operation):
        detail = f"{name} is read by {operation.node.target}, expected conv2d or linear"
        return Reason.UNSUPPORTED_OPERATOR, detail
    if operation.groups > 1:
        detail = f"{name} has {operation.groups} groups: a dense 1 x 1 after it would cost more"
        return Reason.NOT_APPLICABLE, detail
    if operation.bias is not None and weight_name(operation.bias) is None:
        return Reason.NOT_CONSTANT, f"the bias of {operation.node.name} is computed"
    if operation.bias is not None:
        bias = str(operation.bias.target)
        if len(list(readers(program, bias))) > 1:
            return Reason.OTHER_USERS, f"{bias} is also read by other nodes"
        if not isinstance(encoding_of(program, bias), Dense):
            return Reason.ALREADY_ENCODED, f"{bias} is stored in another form"
    named = any(one in wanted.named for one in candidate.spellings)
    if not named and gives_outputs(program, candidate):
        detail = f"{name} gives outputs of the program, whose errors nothing makes up for; only a"
        return Reason.NOT_APPLICABLE, f"{detail} rank for '{name}' itself splits it"
    if wanted.spatial_only and (operation.linear or min(candidate.weight.shape[2:]) == 1):
        return Reason.NOT_APPLICABLE, f"{name} has no height and width to split"
    return None
