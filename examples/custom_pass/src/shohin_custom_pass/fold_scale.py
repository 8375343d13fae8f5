"""Fold constant factors into weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from shohin.ir import Fact, Program, readers
from shohin.passes import (
    Change,
    Context,
    Match,
    NoMatch,
    Pass,
    PassResult,
    Reason,
    Rewriter,
    Rule,
    apply_rules,
    argument,
)
from shohin.passes.analyses.operators import WeightedOperation, weighted_operation
from shohin.passes.patterns import constant_weight, single_user, weight_name


class _ScaleRule(Rule):
    """Multiply a factor into the weight and bias of the operation that it scales."""

    roots = frozenset({torch.ops.aten.mul.Tensor})

    def __init__(self, program: Program, limit: float) -> None:
        self._program = program
        self._limit = limit

    def match(self, node: fx.Node) -> Match | NoMatch:
        factor = argument(node, "other")
        if not isinstance(factor, (int, float)):
            return NoMatch(Reason.NOT_CONSTANT, "its factor is not a number")
        if not 1 / self._limit <= abs(factor) <= self._limit:
            return NoMatch(Reason.NOT_EXACT, f"its factor {factor} is beyond the limit")
        scaled = argument(node, "self")
        operation = weighted_operation(scaled)
        if operation is None:
            return NoMatch(Reason.NOT_APPLICABLE, "its input is no convolution or linear map")
        if single_user(scaled) is None:
            return NoMatch(Reason.OTHER_USERS, f"{scaled.name} is used elsewhere as well")
        return self._obstacle(operation) or Match(node, values={"operation": operation})

    def _obstacle(self, operation: WeightedOperation) -> NoMatch | None:
        """Why the weights of an operation cannot be scaled, or None."""
        for source in _weights(operation):
            name = weight_name(source)
            if name is None:
                return NoMatch(Reason.NOT_CONSTANT, f"{source.name} is computed")
            if name in self._program.encodings:
                return NoMatch(Reason.ALREADY_ENCODED, f"{name} has an encoding")
            if set(readers(self._program, name)) != {operation.node}:
                return NoMatch(Reason.OTHER_USERS, f"{name} is used elsewhere as well")
        return None

    def rewrite(self, match: Match, rewriter: Rewriter) -> Change:
        operation: WeightedOperation = match.values["operation"]
        factor = argument(match.root, "other")
        for source in _weights(operation):
            value = constant_weight(source)
            if value is not None:
                rewriter.set_weight(source, value * factor, {operation.node})
        rewriter.replace_uses(match.root, operation.node)
        rewriter.erase(match.root)
        return Change("folded", f"factor {factor} into {operation.node.name}")


def _weights(operation: WeightedOperation) -> list[fx.Node]:
    """The nodes that give the weight and, where there is one, the bias."""
    return [operation.weight] if operation.bias is None else [operation.weight, operation.bias]


@dataclass(frozen=True, kw_only=True)
class FoldScale(Pass):
    """Multiply constant factors into the weights of the convolution or linear map before them.

    Every weight is rounded once, so a result may differ by rounding unless the factor is a power
    of two. Before::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
        %mul = aten.mul.Tensor(%linear, other=0.125)
        return %mul

    After, with an eighth of the weight and bias::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
        return %linear

    Attributes:
        limit: factors above this, or below its inverse, are left where they are.
    """

    name: ClassVar[str] = "fold-scale"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})

    limit: float = 1e6

    def validate(self) -> None:
        """Check the range of the limit."""
        if not self.limit >= 1:
            raise self.invalid_option("limit", "1 or more")

    def run(self, program: Program, context: Context) -> PassResult:
        """Fold every factor that the context allows."""
        folded = apply_rules(program, [_ScaleRule(program, self.limit)], context)
        return PassResult(program, modified=folded > 0)
