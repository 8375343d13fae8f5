"""Captured modules in a form that really trains.

A module is captured in inference mode: whether a batch normalisation uses the statistics of its
batch, and whether a dropout drops, are constants in the arguments of their nodes, and no call of
``module.train()`` reaches them. Here the module gets another graph for a while, in which they
follow ``module.training``, so that any PyTorch loop works on it, evaluation in between included.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from shohin.ir.masking import masked

_aten = torch.ops.aten
_MARK = "shohin_trainable"
_FLAGS = frozenset({"train", "training", "use_input_stats"})
_INFERENCE_NORM = _aten._native_batch_norm_legit_no_training.default
_MOMENTUM = 0.1
"""PyTorch's default, for a batch normalisation whose own momentum is None: such a one averages
over all batches it has seen, and is captured with momentum 0."""


@contextmanager
def trainable(
    module: fx.GraphModule,
    *,
    masks: Mapping[str, Tensor] | None = None,
    frozen: Collection[str] = (),
    frozen_statistics: Collection[str] = (),
    dropout: Mapping[str, float] | None = None,
) -> Iterator[None]:
    """Put a captured module, in place, into a form that really trains.

    Inside, ``module.train()`` and ``module.eval()`` switch dropout and batch normalisation, as in
    the model that was captured; the module is in training mode at first. Batch normalisations
    update their running statistics. Every floating-point parameter asks for gradients. What
    dropped, or normalised by its batch, in inference already (``F.dropout(x)`` without a flag) is
    left as it is. Attention was captured without its dropout, and trains without it.

    Afterwards, after an error too, graph, modes and gradient flags are those from before, node by
    node; what remains is the trained weights and statistics. Gradients are dropped.

    Used inside of itself on the same module it does nothing, so that a training function may ask
    for it whether or not its caller has.

    Args:
        module: the module of a captured program.
        masks: bool tensors by weight name; the weights are held at zero outside of them. See
            `shohin.ir.masking.masked`.
        frozen: names of parameters that are not trained.
        frozen_statistics: names of batch normalisation nodes that go on using their running
            statistics, and do not update them.
        dropout: probabilities by name of dropout node, instead of those in the graph.

    Raises:
        SpecError: when a mask does not fit its weight.
    """
    if module.meta.get(_MARK):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_marked(module))
        stack.enter_context(_modes_kept(module))
        graph = _training_graph(module.graph, frozen_statistics, dropout or {})
        stack.enter_context(_graph_swapped(module, graph))
        stack.enter_context(_asking_for_gradients(module, frozen))
        stack.enter_context(masked(module, masks or {}))
        stack.enter_context(torch.enable_grad())
        module.train()
        yield


def is_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout that does nothing in inference, but would in training."""
    flag = _flag_of(node)
    return flag is not None and _position(node, "p") is not None


def dropout_probability(node: fx.Node) -> float:
    """The probability of a dropout node, for which `is_dropout` holds."""
    return float(_argument(node, "p"))


@contextmanager
def _marked(module: fx.GraphModule) -> Iterator[None]:
    module.meta[_MARK] = True
    try:
        yield
    finally:
        del module.meta[_MARK]


@contextmanager
def _modes_kept(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _graph_swapped(module: fx.GraphModule, graph: fx.Graph) -> Iterator[None]:
    """Let a module compute another graph; its own is not touched."""
    own = module.graph
    module.graph = graph
    try:
        yield
    finally:
        module.graph = own


@contextmanager
def _asking_for_gradients(module: nn.Module, frozen: Collection[str]) -> Iterator[None]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    held = {id(parameters[name]) for name in frozen if name in parameters}
    asked = {parameter: parameter.requires_grad for parameter in parameters.values()}
    for parameter in (one for one in asked if one.is_floating_point()):
        parameter.requires_grad_(id(parameter) not in held)
    try:
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)
            parameter.grad = None


def _training_graph(
    source: fx.Graph, frozen_statistics: Collection[str], dropout: Mapping[str, float]
) -> fx.Graph:
    """A copy of a graph whose training flags read ``module.training``."""
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    # Not graph.get_attr, which warns of an attribute that is no tensor.
    flag = graph.create_node("get_attr", "training")
    result = graph.graph_copy(source, copies)
    graph.output(result)
    for node in source.nodes:
        if node in copies and node.name not in frozen_statistics:
            _switch(copies[node], flag)
        if node.name in dropout:
            _set_argument(copies[node], "p", dropout[node.name])
    if not flag.users:
        graph.erase_node(flag)
    return graph


def _switch(node: fx.Node, flag: fx.Node) -> None:
    name = _flag_of(node)
    if name is not None:
        _set_argument(node, name, flag)
        if _position(node, "momentum") is not None and _argument(node, "momentum") == 0:
            _set_argument(node, "momentum", _MOMENTUM)
    elif node.target is _INFERENCE_NORM:
        node.args, node.kwargs = (flag, *node.args), node.kwargs
        node.target = _normalise


def _normalise(
    training: bool,
    input: Tensor,  # noqa: A002 - the operator's own name, which calls may spell out
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in its inference-only form, made able to train."""
    if not training:
        found: tuple[Tensor, Tensor, Tensor] = _INFERENCE_NORM(
            input, weight, bias, running_mean, running_var, momentum, eps
        )
        return found
    step = momentum or _MOMENTUM
    return torch.native_batch_norm(input, weight, bias, running_mean, running_var, True, step, eps)


def _flag_of(node: fx.Node) -> str | None:
    """The argument of a node that says whether it trains, where it says that it does not."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    names = [declared.name for declared in node.target._schema.arguments]
    found = next((name for name in names if name in _FLAGS), None)
    return found if found is not None and _argument(node, found) is False else None


def _position(node: fx.Node, name: str) -> int | None:
    """Where an operator has an argument of that name; None when it has none."""
    if not isinstance(node.target, OpOverload):
        return None
    names = [declared.name for declared in node.target._schema.arguments]
    return names.index(name) if name in names else None


def _argument(node: fx.Node, name: str) -> Any:
    position = _position(node, name)
    if name in node.kwargs or position is None:
        return node.kwargs.get(name)
    if position < len(node.args):
        return node.args[position]
    target: Any = node.target
    return target._schema.arguments[position].default_value


def _set_argument(node: fx.Node, name: str, value: Any) -> None:
    position = _position(node, name)
    if position is not None and position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)
