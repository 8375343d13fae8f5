"""Drop operators that give what they are given."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import fx
from torch._ops import OpOverload

from shohin.ir.program import Fact, Program
from shohin.passes.analyses.operators import is_random
from shohin.passes.analyses.shapes import Shapes, TensorLayout, shapes_at
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.patterns import Change, Match, NoMatch, Rewriter, Rule, apply_rules, argument
from shohin.passes.remarks import Reason

_aten = torch.ops.aten

# Two batch sizes tell a size that is the batch from a fixed size; 1 would hide broadcasting.
_PROBES = (2, 3)
_UNLIMITED = 2**63 - 1

_Check: TypeAlias = Callable[[fx.Node, Shapes, Shapes], NoMatch | None]


def _always(node: fx.Node, small: Shapes, large: Shapes) -> None:
    """Check of an operator that is the identity whenever its result looks like its input."""


def _check_dropout(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    return NoMatch(Reason.TRAINING_MODE, "it drops elements") if is_random(node) else None


def _check_permute(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    axes = argument(node, "dims") or (argument(node, "dim0"), argument(node, "dim1"))
    rank = len(small.of(node).shape)
    found = [axis % rank for axis in axes]
    same = found[0] == found[1] if node.target is _aten.transpose.int else found == [*range(rank)]
    return None if same else NoMatch(Reason.NOT_APPLICABLE, "it moves axes")


def _check_slice(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    source = argument(node, "self")
    axis = argument(node, "dim")
    end, step = argument(node, "end"), argument(node, "step")
    depends_on_batch = small.of(source).shape[axis] != large.of(source).shape[axis]
    if depends_on_batch and end is not None and not (isinstance(end, int) and end >= _UNLIMITED):
        return NoMatch(Reason.NOT_APPLICABLE, f"a batch may have more than {end} elements")
    return None if step == 1 else NoMatch(Reason.NOT_APPLICABLE, f"it takes every {step}th element")


def _check_window(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    kernel = argument(node, "kernel_size")
    stride = argument(node, "stride") or kernel
    unpadded = all(width == 0 for width in _listed(argument(node, "padding")))
    plain = argument(node, "divisor_override") in (None, 1)
    if plain and unpadded and all(width == 1 for width in [*_listed(kernel), *_listed(stride)]):
        return None
    return NoMatch(Reason.NOT_APPLICABLE, "its window is not a single element")


def _check_padding(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    widths = argument(node, "pad")
    if all(isinstance(width, int) and width == 0 for width in widths):
        return None
    return NoMatch(Reason.NOT_APPLICABLE, "it adds or cuts off elements")


def _check_offset(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    other, alpha = argument(node, "other"), argument(node, "alpha")
    if not isinstance(other, (int, float)) or not isinstance(alpha, (int, float)):
        return NoMatch(Reason.NOT_APPLICABLE, "its operand is not a constant")
    added = other * alpha
    if added != 0:
        return NoMatch(Reason.NOT_APPLICABLE, "its operand is not 0")
    subtracts = node.target in (_aten.sub.Tensor, _aten.sub.Scalar)
    negative_zero = (math.copysign(1.0, added) < 0) != subtracts
    if small.of(node).dtype.is_floating_point and not negative_zero:
        return NoMatch(Reason.NOT_EXACT, "it turns -0.0 into 0.0")
    return None


def _check_factor(node: fx.Node, small: Shapes, large: Shapes) -> NoMatch | None:
    other = argument(node, "other")
    if not isinstance(other, (int, float)):
        return NoMatch(Reason.NOT_APPLICABLE, "its operand is not a constant")
    return None if other == 1 else NoMatch(Reason.NOT_APPLICABLE, "its operand is not 1")


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _checks() -> dict[OpOverload, _Check]:
    by_check: dict[_Check, tuple[OpOverload, ...]] = {
        _always: (
            *(_aten.alias.default, _aten.detach.default, _aten.detach_.default),
            *(_aten.lift_fresh_copy.default, _aten.contiguous.default, _aten.clone.default),
            *(_aten.to.dtype, _aten.to.device, _aten.to.dtype_layout, _aten.to.other),
            *(_aten._to_copy.default, _aten.type_as.default),
            *(_aten.view.default, _aten.view_as.default, _aten._unsafe_view.default),
            *(_aten.reshape.default, _aten.flatten.using_ints, _aten.unflatten.int),
            *(_aten.expand.default, _aten.expand_as.default, _aten.repeat.default),
            *(_aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default),
            _aten.adaptive_avg_pool3d.default,
        ),
        _check_dropout: (
            *(_aten.dropout.default, _aten.feature_dropout.default),
            *(_aten.alpha_dropout.default, _aten.feature_alpha_dropout.default),
        ),
        _check_permute: (_aten.permute.default, _aten.transpose.int),
        _check_slice: (_aten.slice.Tensor,),
        _check_window: (
            *(_aten.max_pool1d.default, _aten.max_pool2d.default, _aten.max_pool3d.default),
            *(_aten.avg_pool1d.default, _aten.avg_pool2d.default, _aten.avg_pool3d.default),
        ),
        _check_padding: (_aten.pad.default, _aten.constant_pad_nd.default),
        _check_offset: (*(_aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub.Scalar),),
        _check_factor: (*(_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar),),
    }
    return {target: check for check, targets in by_check.items() for target in targets}


_CHECKS: Mapping[OpOverload, _Check] = _checks()


def _check_likeness(given: TensorLayout, made: TensorLayout) -> NoMatch | None:
    """Whether a result has the shape, type, device and memory layout of its input."""
    if given.dtype != made.dtype:
        return NoMatch(Reason.NOT_EXACT, f"it turns {given.dtype} into {made.dtype}")
    if given.shape != made.shape:
        return NoMatch(Reason.NOT_APPLICABLE, f"it turns {given.shape} into {made.shape}")
    if given.device != made.device:
        return NoMatch(Reason.NOT_APPLICABLE, f"it moves to {made.device}")
    strides = zip(given.shape, given.strides, made.strides, strict=True)
    if any(size > 1 and one != two for size, one, two in strides):
        return NoMatch(Reason.NOT_EXACT, "it changes the layout in memory, which views depend on")
    return None


class _DropRule(Rule):
    """Use the input of an identity in its place."""

    roots = frozenset(_CHECKS)

    def __init__(self, program: Program) -> None:
        self._small, self._large = (shapes_at(program, batch) for batch in _PROBES)

    def match(self, node: fx.Node) -> Match | NoMatch:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return NoMatch(Reason.NOT_APPLICABLE, "its first argument is not a tensor")
        for layouts in (self._small, self._large):
            unlike = _check_likeness(layouts.of(source), layouts.of(node))
            if unlike:
                return unlike
        obstacle = _CHECKS[node.target](node, self._small, self._large)  # type: ignore[index]
        return obstacle or Match(node, {"source": source})

    def rewrite(self, match: Match, rewriter: Rewriter) -> Change:
        rewriter.replace_uses(match.root, match.nodes["source"])
        rewriter.erase(match.root)
        return Change("dropped", "it gives what it is given")


@dataclass(frozen=True, kw_only=True)
class DropIdentity(Pass):
    """Drop operators that give what they are given, bit for bit and for every batch size.

    These are dropout in inference mode, aliases, copies, conversions to the same type, views to
    the same shape, windows of one element, padding by nothing, and arithmetic with a neutral
    constant. Adding 0 to floating-point numbers stays, for it turns -0.0 into 0.0. A copy that
    changes the layout in memory stays, for a later view may depend on it. Once dropout is gone no
    later training has it: put this pass after prune and other passes that retrain. Before::

        %relu = aten.relu(%x)
        %dropout = aten.dropout(%relu, p=0.5, train=False)
        %flatten = aten.flatten.using_ints(%dropout, start_dim=1)
        return %flatten

    After::

        %relu = aten.relu(%x)
        %flatten = aten.flatten.using_ints(%relu, start_dim=1)
        return %flatten
    """

    name: ClassVar[str] = "drop-identity"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.DEAD_REMOVED})

    def run(self, program: Program, context: Context) -> PassResult:
        """Drop every identity that the context allows."""
        dropped = apply_rules(program, [_DropRule(program)], context)
        return PassResult(program, modified=dropped > 0)
