"""Fold batch normalisation into convolutions and linear maps."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from shohin.errors import PassError
from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.program import Fact, Program, readers, tensor_of
from shohin.ir.ternary import Ternary
from shohin.passes.analyses.cost import cost
from shohin.passes.analyses.normalisation import Affine, affine_of
from shohin.passes.analyses.operators import (
    WeightedOperation,
    pads_with_zeros,
    weighted_operation,
)
from shohin.passes.analyses.shapes import shapes
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.patterns import (
    Change,
    Match,
    NoMatch,
    Rewriter,
    Rule,
    apply_rules,
    argument,
    constant_weight,
    single_user,
    weight_name,
)
from shohin.passes.remarks import NodeCost, Reason
from shohin.passes.scaling import per_group, scale_channels

_aten = torch.ops.aten
_PLAIN = _aten.batch_norm.default
_TUPLE = _aten._native_batch_norm_legit_no_training.default


def _result(node: fx.Node) -> fx.Node | None:
    """The node that carries the normalised values; None when the statistics are used as well."""
    if node.target == _PLAIN:
        return node
    user = single_user(node)
    return user if user is not None and user.args[1:] == (0,) else None


def _response(operation: WeightedOperation, weight: Tensor, shift: Tensor) -> Tensor:
    """What a constant per input channel adds to every output that all taps reach."""
    shifted = scale_channels(operation, weight, shift, outputs=False)
    inputs = 1 if operation.transposed else 2
    return per_group(operation, shifted).sum((inputs, 3)).flatten()


class _FoldRule(Rule):
    """Fold a batch normalisation into the operation before it, or else into the one after it."""

    roots = frozenset({_PLAIN, _TUPLE})

    def __init__(self, program: Program, context: Context) -> None:
        self._program = program
        self._layouts = context.analyses.get(shapes, program)
        nodes = context.analyses.get(cost, program).nodes
        self._costs = {name: spent.for_remark() for name, spent in nodes.items()}
        self.encodings: dict[str, Encoding] = dict(program.encodings)

    def match(self, node: fx.Node) -> Match | NoMatch:
        affine = affine_of(node)
        if isinstance(affine, NoMatch):
            return affine
        result = _result(node)
        if result is None:
            return NoMatch(Reason.OTHER_USERS, "its statistics are used as well")
        before = self._match_before(node, result, affine)
        if isinstance(before, Match):
            return before
        after = self._match_after(node, result, affine)
        informative = before.reason != Reason.NOT_APPLICABLE
        return before if informative and isinstance(after, NoMatch) else after

    def _match_before(self, node: fx.Node, result: fx.Node, affine: Affine) -> Match | NoMatch:
        source = argument(node, "input")
        operation = weighted_operation(source)
        if operation is None:
            return NoMatch(Reason.NOT_APPLICABLE, "its input is no convolution or linear map")
        if single_user(source) is None:
            return NoMatch(Reason.OTHER_USERS, f"{source.name} is used elsewhere as well")
        values = {"operation": operation, "affine": affine, "outputs": True}
        match = Match(node, {"result": result, "data": operation.data}, values)
        return self._obstacle(node, operation, outputs=True) or match

    def _match_after(self, node: fx.Node, result: fx.Node, affine: Affine) -> Match | NoMatch:
        user = single_user(result)
        operation = None if user is None else weighted_operation(user)
        if user is None:
            return NoMatch(Reason.OTHER_USERS, "its result is used more than once, or not at all")
        if operation is None or operation.data is not result:
            detail = "neither its input nor its user is a convolution or linear map"
            return NoMatch(Reason.NOT_APPLICABLE, detail)
        if bool(affine.shift.any()) and pads_with_zeros(operation):
            return NoMatch(Reason.NOT_EXACT, f"{user.name} pads with zeros, which are not shifted")
        values = {"operation": operation, "affine": affine, "outputs": False}
        match = Match(node, {"result": result, "data": argument(node, "input")}, values)
        return self._obstacle(node, operation, outputs=False) or match

    def _obstacle(
        self, node: fx.Node, operation: WeightedOperation, *, outputs: bool
    ) -> NoMatch | None:
        """Why the weights of an operation cannot take in the normalisation, or None."""
        weight = constant_weight(operation.weight)
        constant_bias = operation.bias is None or constant_weight(operation.bias) is not None
        if weight is None or not constant_bias:
            detail = f"the weights of {operation.node.name} are computed"
            return NoMatch(Reason.NOT_CONSTANT, detail)
        rank = len(self._layouts.tensors[node.name][0].shape)
        if rank != weight.dim():
            return NoMatch(Reason.NOT_EXACT, f"axis 1 is no channel of {operation.node.name}")
        rows = outputs and not operation.transposed
        for source in (operation.weight, operation.bias):
            name = weight_name(source)
            held = self.encodings.get(name or "")
            if isinstance(held, Ternary) and source is operation.weight and rows:
                continue
            values = held.values if isinstance(held, Sparse) else held
            if values is not None and not isinstance(values, Dense):
                return NoMatch(Reason.ALREADY_ENCODED, f"{name} is stored as {values.describe()}")
        return None

    def rewrite(self, match: Match, rewriter: Rewriter) -> Change:
        operation: WeightedOperation = match.values["operation"]
        outputs: bool = match.values["outputs"]
        before = _sum(self._costs[operation.node.name], self._costs[match.root.name])
        weight, bias = _fold(operation, match.values["affine"], outputs=outputs)
        weight_node = self._store(
            rewriter, operation, operation.weight, weight, match.values["affine"].scale
        )
        bias_node = self._store_bias(rewriter, operation, bias)
        parts = {"input": match.nodes["data"], "weight": weight_node, "bias": bias_node}
        made = _remake(rewriter, operation.node, parts, replaces=(operation.node, match.root))
        rewriter.replace_uses(match.nodes["result"] if outputs else operation.node, made)
        _erase(rewriter, {operation.node, match.root, match.nodes["result"]})
        self._costs[made.name] = self._cost(made, before.macs)
        copied = weight_node is not operation.weight
        detail = f"into {operation.node.name}" + (", with its own copy of a shared weight" * copied)
        return Change("folded", detail, before, self._costs[made.name])

    def _store(
        self,
        rewriter: Rewriter,
        operation: WeightedOperation,
        source: fx.Node,
        value: Tensor,
        scale: Tensor | None = None,
    ) -> fx.Node:
        """Give the operation a new weight or bias: its own, or a copy where others read it too."""
        name = str(source.target)
        held = self.encodings.get(name)
        ternary = (
            held.times_rows(scale) if isinstance(held, Ternary) and scale is not None else None
        )
        if ternary is not None:
            value = ternary.materialise()
        if isinstance(held, Sparse):
            # 0 times a negative scale is -0.0, which no stored element stands for.
            value = value.masked_fill(~held.mask, 0.0)
        if set(readers(self._program, name)) == {operation.node}:
            rewriter.set_weight(source, value, {operation.node})
        else:
            source = rewriter.add_weight(name, value, replaces=operation.node)
        if isinstance(held, Sparse):
            sparse = Sparse.from_dense(value, held.mask, held.gap_bits)
            self.encodings[str(source.target)] = sparse
        elif ternary is not None:
            self.encodings[str(source.target)] = ternary
        elif held is not None:
            self.encodings[str(source.target)] = Dense(value)
        return source

    def _store_bias(
        self, rewriter: Rewriter, operation: WeightedOperation, value: Tensor
    ) -> fx.Node | None:
        if operation.bias is not None:
            return self._store(rewriter, operation, operation.bias, value)
        if not bool(value.any()):
            return None
        owner, _, leaf = str(operation.weight.target).rpartition(".")
        stem = f"{owner}.bias" if owner else f"{leaf}_bias"
        return rewriter.add_weight(stem, value, replaces=operation.node)

    def _cost(self, node: fx.Node, macs: int) -> NodeCost:
        names = [name for source in node.all_input_nodes if (name := weight_name(source))]
        stored = [
            self.encodings.get(name) or Dense(tensor_of(self._program.module, name).detach())
            for name in names
        ]
        return NodeCost(
            sum(_kept(encoding) for encoding in stored),
            macs,
            sum(encoding.stored_bytes() for encoding in stored),
        )


def _fold(operation: WeightedOperation, affine: Affine, *, outputs: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of an operation that normalises its outputs, or else its inputs, too.

    Computed in float64 and rounded once.
    """
    weight = _constant(operation.weight)
    channels = affine.scale.numel() if outputs else _output_channels(operation, weight)
    bias = torch.zeros(channels) if operation.bias is None else _constant(operation.bias)
    scaled = scale_channels(operation, weight.double(), affine.scale, outputs=outputs)
    if outputs:
        moved = bias.double() * affine.scale + affine.shift
    else:
        moved = bias.double() + _response(operation, weight.double(), affine.shift)
    return scaled.to(weight.dtype), moved.to(weight.dtype)


def _output_channels(operation: WeightedOperation, weight: Tensor) -> int:
    return weight.shape[1] * operation.groups if operation.transposed else weight.shape[0]


def _constant(node: fx.Node) -> Tensor:
    value = constant_weight(node)
    if value is None:
        raise PassError(f"node '{node.name}'", "expected a weight")
    return value


def _remake(
    rewriter: Rewriter, node: fx.Node, parts: dict[str, Any], replaces: tuple[fx.Node, ...]
) -> fx.Node:
    """A call of the node's operator with other arguments of these names."""
    target = cast("OpOverload", node.target)
    names = [declared.name for declared in target._schema.arguments]
    spelled = {**dict(zip(names, node.args, strict=False)), **node.kwargs, **parts}
    positional = names[: max(len(node.args), len(parts))]
    args = [spelled.pop(name) for name in positional]
    return rewriter.call(target, *args, replaces=replaces, **spelled)


def _erase(rewriter: Rewriter, nodes: set[fx.Node]) -> None:
    """Erase the nodes of the pattern and the weights that only they read."""
    sources = {source for node in nodes for source in node.all_input_nodes}
    rewriter.erase(*nodes)
    rewriter.erase(*(one for one in sources if one.op == "get_attr" and not one.users))


def _kept(encoding: Encoding) -> int:
    return (encoding.values if isinstance(encoding, Sparse) else encoding).parameters()


def _sum(one: NodeCost, two: NodeCost) -> NodeCost:
    return NodeCost(
        one.parameters + two.parameters,
        one.macs + two.macs,
        one.stored_bytes + two.stored_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class FoldBatchNorm(Pass):
    """Fold batch normalisation into the convolution or linear map before it, or after it.

    In inference mode batch normalisation is ``x * s + t`` per channel with
    ``s = gamma / sqrt(variance + eps)`` and ``t = beta - mean * s``. After an operation of weight
    W and bias b it becomes the weight ``s W`` and the bias ``s b + t``. Before one it becomes
    ``W s`` and ``b + W t``, which is exact only where no zeros are padded beside the shifted
    input. Weights are computed in float64 and rounded once; a sparse weight keeps its mask, and the
    scales of a ternary one become those of its rows.
    Before::

        %conv2d = aten.conv2d(%x, @conv.weight, padding=[1, 1])
        %batch_norm = aten.batch_norm(%conv2d, @bn.weight, @bn.bias, @bn.running_mean,
                                      @bn.running_var, training=False, eps=1e-05)
        %relu = aten.relu(%batch_norm)

    After::

        %conv2d_default = aten.conv2d(%x, @conv.weight, @conv.bias, padding=[1, 1])
        %relu = aten.relu(%conv2d_default)
    """

    name: ClassVar[str] = "fold-bn"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.DEAD_REMOVED, Fact.ENTROPY_CODED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.BN_FOLDED})

    def run(self, program: Program, context: Context) -> PassResult:
        """Fold every batch normalisation that can be folded exactly."""
        rule = _FoldRule(program, context)
        if not apply_rules(program, [rule], context):
            return PassResult(program, modified=False)
        return PassResult(replace(program, encodings=rule.encodings), modified=True)
