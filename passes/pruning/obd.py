"""Optimal brain damage: how much the loss is expected to rise when a weight is deleted.

LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989.
"""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, fx

from shohin.errors import InputError, PassError, SpecError, UnsupportedError
from shohin.ir.program import Program, tensor_of, weight_names
from shohin.passes.base import Batch, Progress
from shohin.passes.patterns import argument
from shohin.passes.pruning.curvature import Call, Parts, obstacle, pull_back

Loss: TypeAlias = Literal["cross-entropy", "squared-error"]

_aten = torch.ops.aten
_SOFTMAX = frozenset(
    {
        _aten.softmax.int,
        _aten._softmax.default,
        _aten.log_softmax.int,
        _aten._log_softmax.default,
    }
)


def _silent(done: int, total: int, label: str) -> None:
    """Progress callback for callers that want none."""


def diagonal_hessian(
    program: Program,
    names: Sequence[str],
    batches: Iterable[Batch],
    progress: Progress = _silent,
    *,
    loss: Loss = "cross-entropy",
) -> dict[str, Tensor]:
    """Diagonal of the loss' Hessian with respect to weights, averaged over examples.

    One backward pass for each batch, in the Levenberg-Marquardt form of the paper, which drops the
    second derivatives of the network and keeps those of the loss. For ``a = W x`` and
    ``x' = f(a)``::

        d2E/dw_ij^2 = d2E/da_i^2 x_j^2        (summed over positions where a weight is shared)
        d2E/da_i^2  = f'(a_i)^2 d2E/dx'_i^2
        d2E/dx_j^2  = sum_i w_ij^2 d2E/da_i^2

    The recursion also drops every mixed derivative: elements of one tensor, positions that share
    a weight, and the users of one value are treated as if they did not interact. It is the exact
    diagonal of the generalised Gauss-Newton matrix where they do not: for pointwise chains, and
    for the weights of a linear map whose outputs the loss treats apart. Elsewhere it is an
    approximation, and may be off either way.

    No labels are needed. Cross-entropy has the second derivative ``p (1 - p)`` with respect to the
    logits, whatever the label, where `p` is the softmax over axis 1 (the sigmoid for a lone logit).
    A graph that ends in a softmax or log-softmax is taken to have its logits before it. The squared
    error ``sum (y - t)^2 / 2`` has the second derivative 1. Of several outputs the losses add up.

    Args:
        program: a program in functional form; not changed.
        names: weights, by their names in the module.
        batches: calibration batches; read once, one in memory at a time.
        progress: called after each batch.
        loss: what the outputs are trained for.

    Returns:
        By name, second derivatives of the shape of the weight, in units of loss per weight
        squared.

    Raises:
        SpecError: when the graph reads no weight of a name.
        InputError: when there are no batches.
        PassError: when second derivatives are not finite, naming the weight.
        UnsupportedError: naming a node between a weight and the output that has no rule.
    """
    _check_names(program, names)
    sums = {name: torch.zeros_like(tensor_of(program.module, name)).detach() for name in names}
    examples, total = 0, len(batches) if isinstance(batches, Sequence) else 0
    for done, batch in enumerate(batches, 1):
        _add_batch(program, sums, batch, loss)
        examples += batch[0].shape[0] if batch[0].dim() else 1
        progress(done, max(total, done), "second derivatives")
    if examples == 0:
        raise InputError("calibration", "expected at least one batch, got none")
    _check_finite(sums)
    return {name: total_sum / examples for name, total_sum in sums.items()}


def saliencies(
    program: Program,
    names: Sequence[str],
    batches: Iterable[Batch],
    progress: Progress = _silent,
    *,
    loss: Loss = "cross-entropy",
) -> dict[str, Tensor]:
    """The paper's saliency ``h w^2 / 2``: the rise of the loss when a weight is set to zero.

    Arguments and errors as in `diagonal_hessian`.

    Returns:
        By name, saliencies of the shape of the weight, in units of the loss.
    """
    hessian = diagonal_hessian(program, names, batches, progress, loss=loss)
    weights = {name: tensor_of(program.module, name).detach() for name in names}
    return {name: hessian[name] * weights[name] ** 2 / 2 for name in names}


def unsupported_weights(
    program: Program,
    names: Iterable[str],
    batches: Iterable[Batch],
    *,
    loss: Loss = "cross-entropy",
) -> dict[str, UnsupportedError]:
    """The weights for which `diagonal_hessian` fails, with its error, by name.

    Args:
        program: a program; not changed.
        names: weights, by their names in the module.
        batches: calibration batches, of which the first is read.
        loss: what the outputs are trained for.
    """
    batch = next(iter(batches), None)
    if batch is None:
        return {}
    floating = _floating_nodes(program, batch)
    weights = _weight_nodes(program, names)
    wanted = _depending_on(program.graph, weights)
    outputs = (one for one in program.graph.output_node().all_input_nodes if one in floating)
    reached = {_logits_of(node, loss) for node in outputs}
    errors: dict[fx.Node, UnsupportedError] = {}
    for node in (one for one in reversed(program.graph.nodes) if one in wanted):
        if node not in reached or node in weights:
            continue
        sources = _sources(node, wanted, floating)
        reached.update(sources)
        error = errors.get(node)
        if error is None and sources and node.target is not operator.getitem:
            error = obstacle(node, sources)
        if error is not None:
            errors = {**dict.fromkeys(sources, error), **errors}
    return {str(node.target): errors[node] for node in weights if node in errors}


class _Kinds(fx.Interpreter):
    """Runs a module and remembers which nodes give one floating-point tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.floating: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _is_floating(value):
            self.floating.add(n)
        return value


def _floating_nodes(program: Program, batch: Batch) -> set[fx.Node]:
    kinds = _Kinds(program.module)
    with torch.no_grad():
        kinds.run(*batch)
    return kinds.floating


def _check_names(program: Program, names: Sequence[str]) -> None:
    known = weight_names(program)
    for name in names:
        if name not in known:
            raise SpecError(f"weight '{name}'", "the graph reads no weight of that name")


def _check_finite(sums: Mapping[str, Tensor]) -> None:
    for name, found in sums.items():
        if not bool(torch.isfinite(found).all()):
            raise PassError(
                f"weight '{name}'",
                "its second derivatives on the calibration batches are not finite",
                "look for NaN or infinite values in the batches and the weights",
            )


def _add_batch(program: Program, sums: dict[str, Tensor], batch: Batch, loss: Loss) -> None:
    with torch.no_grad():
        recorder = fx.Interpreter(program.module, garbage_collect_values=False)
        recorder.run(*batch)
        values: dict[fx.Node, Any] = recorder.env
        for node, found in _recursion(program.graph, values, _weight_nodes(program, sums), loss):
            sums[str(node.target)] += found


def _weight_nodes(program: Program, names: Iterable[str]) -> set[fx.Node]:
    wanted = set(names)
    return {node for node in program.graph.find_nodes(op="get_attr") if node.target in wanted}


def _recursion(
    graph: fx.Graph, values: dict[fx.Node, Any], weights: set[fx.Node], loss: Loss
) -> Iterator[tuple[fx.Node, Tensor]]:
    """Go backwards through a graph; give each weight's second derivatives when it is reached."""
    wanted = _depending_on(graph, weights)
    curvature: dict[fx.Node, Parts] = {}
    for node, found in _seeds(graph, values, loss):
        _accumulate(curvature, node, 0, found)
    for node in reversed(graph.nodes):
        parts = curvature.pop(node, None)
        if parts is not None and node in weights:
            yield node, parts[0]
        elif parts is not None and node in wanted:
            _spread(node, parts, values, wanted, curvature)
        values.pop(node, None)


def _depending_on(graph: fx.Graph, weights: set[fx.Node]) -> set[fx.Node]:
    """The weights and every node that is computed from them."""
    found = set(weights)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _sources(node: fx.Node, wanted: set[fx.Node], floating: set[fx.Node]) -> tuple[fx.Node, ...]:
    """The arguments that a node's second derivatives are handed on to."""
    if node.target is operator.getitem:
        return (cast("fx.Node", node.args[0]),)
    return tuple(one for one in node.all_input_nodes if one in wanted and one in floating)


def _spread(
    node: fx.Node,
    parts: Parts,
    values: Mapping[fx.Node, Any],
    wanted: set[fx.Node],
    curvature: dict[fx.Node, Parts],
) -> None:
    """Hand a node's second derivatives on to its arguments."""
    if node.target is operator.getitem:
        source, position = cast("tuple[fx.Node, int]", node.args)
        _accumulate(curvature, source, position, parts[0])
        return
    sources = (one for one in node.all_input_nodes if one in wanted)
    floating = tuple(one for one in sources if _is_floating(values[one]))
    if not floating:
        return
    for source, found in pull_back(Call(node, values, floating), parts).items():
        _accumulate(curvature, source, 0, found)


def _accumulate(
    curvature: dict[fx.Node, Parts], node: fx.Node, position: int, found: Tensor
) -> None:
    parts = curvature.setdefault(node, {})
    parts[position] = parts[position] + found if position in parts else found


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _seeds(
    graph: fx.Graph, values: Mapping[fx.Node, Any], loss: Loss
) -> Iterator[tuple[fx.Node, Tensor]]:
    """The outputs, or the logits that they are the softmax of, and their second derivatives."""
    outputs = [one for one in graph.output_node().all_input_nodes if _is_floating(values[one])]
    if not outputs:
        raise UnsupportedError("model", "no output is floating-point, so no loss has a derivative")
    for node in outputs:
        if loss == "squared-error":
            yield node, torch.ones_like(values[node])
        elif node.target in _SOFTMAX:
            logits = _logits_of(node, loss)
            yield logits, _cross_entropy(values[logits], argument(node, "dim"))
        else:
            yield node, _cross_entropy(values[node], min(1, values[node].dim() - 1))


def _logits_of(node: fx.Node, loss: Loss) -> fx.Node:
    """What an output is the softmax of, where the loss is taken of its logits; else itself."""
    if loss == "cross-entropy" and node.target in _SOFTMAX:
        return cast("fx.Node", argument(node, "self"))
    return node


def _cross_entropy(logits: Tensor, axis: int) -> Tensor:
    """Second derivatives ``p (1 - p)`` of the cross-entropy with respect to its logits."""
    lone = logits.dim() == 0 or logits.shape[axis] == 1
    p = logits.sigmoid() if lone else logits.softmax(axis)
    return p * (1 - p)
