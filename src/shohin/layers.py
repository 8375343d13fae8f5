"""The layers of a program and what each costs: rows of reports and of ``shohin inspect``."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from shohin.ir.annotations import Origin, annotation
from shohin.ir.printer import format_target
from shohin.ir.program import Program, encoding_of, is_tensor_name, tensor_of
from shohin.passes.analyses.cost import Cost, cost
from shohin.passes.analyses.operators import weighted_operation
from shohin.tables import Grid, shape_text


@dataclass(frozen=True)
class Layer:
    """The nodes that come from one module of the model, taken together, at batch 1.

    Weights that several layers share count at the first of them, so that layers add up to totals.

    Attributes:
        name: dotted path of the module; the node's name where there is none.
        kind: class name of the module; the operator's name where there is none.
        shapes: shapes of its main weights, e.g. the kernel of a convolution without its bias.
        encoding: how the main weights are stored.
        parameters: elements of its parameters, buffers left out.
        nonzeros: those of them that are not left out by their encoding.
        macs: multiply-accumulates on dense weights.
        nonzero_macs: multiply-accumulates without those by zeros that an encoding leaves out.
        stored_bytes: size of its weights and buffers as encoded.
    """

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...] = ()
    encoding: str = ""
    parameters: int = 0
    nonzeros: int = 0
    macs: int = 0
    nonzero_macs: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True)
class Totals:
    """What a whole program costs at batch 1; the figures are those of `Layer`.

    Attributes:
        parameters: elements of all parameters, shared ones once.
        nonzeros: those that are not left out by their encoding.
        macs: multiply-accumulates on dense weights.
        nonzero_macs: multiply-accumulates without those by left out zeros.
        stored_bytes: size of all weights and buffers as encoded.
        peak_memory_bytes: most bytes of intermediate tensors that are live at once.
    """

    parameters: int
    nonzeros: int
    macs: int
    nonzero_macs: int
    stored_bytes: int
    peak_memory_bytes: int


@dataclass
class _Group:
    """The nodes of one layer while they are collected."""

    name: str
    kind: str
    nodes: list[fx.Node] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)


def totals_of(program: Program) -> Totals:
    """What a program costs."""
    return _totals(cost(program))


def layers_of(program: Program) -> tuple[Layer, ...]:
    """The layers of a program that have weights or multiply, in the order in which they run."""
    costs = cost(program)
    layers = (_layer(program, group, costs) for group in _groups(program, costs))
    return tuple(layer for layer in layers if layer.stored_bytes or layer.macs or layer.parameters)


def layer_grid(program: Program) -> Grid:
    """The layers of a program as a table, the totals last."""
    totals = totals_of(program)
    rows = tuple(
        (
            layer.name,
            layer.kind,
            shape_text(layer.shapes),
            layer.encoding,
            f"{layer.nonzeros:,}",
            f"{layer.nonzero_macs:,}",
            f"{layer.stored_bytes:,}",
        )
        for layer in layers_of(program)
    )
    footer = (
        *("total", "", "", ""),
        f"{totals.nonzeros:,}",
        f"{totals.nonzero_macs:,}",
        f"{totals.stored_bytes:,}",
    )
    columns = ("layer", "kind", "shape", "encoding", ">parameters", ">MACs", ">bytes")
    return Grid("", columns, rows, footer, ("kind", "shape", ">MACs"))


def _totals(costs: Cost) -> Totals:
    return Totals(
        costs.parameters,
        costs.nonzeros,
        costs.macs,
        costs.nonzero_macs,
        costs.stored_bytes,
        costs.peak_memory_bytes,
    )


def _groups(program: Program, costs: Cost) -> list[_Group]:
    """The nodes of each layer, every weight at the first layer that reads it."""
    names = {id(tensor_of(program.module, name)): name for name in costs.weights}
    groups: dict[str, _Group] = {}
    for node in (node for node in program.graph.nodes if node.op == "call_function"):
        name, kind = _identity(node)
        group = groups.setdefault(name, _Group(name, kind))
        group.nodes.append(node)
        for tensor in _weights_read(program, node):
            if tensor in names:
                group.weights.append(names.pop(tensor))
    return list(groups.values())


def _identity(node: fx.Node) -> tuple[str, str]:
    """Name and kind of the layer that a node belongs to."""
    origin = annotation(node, Origin)
    if origin is None or not origin.module:
        return node.name, format_target(node.target)
    return origin.module, origin.module_type


def _weights_read(program: Program, node: fx.Node) -> Iterator[int]:
    """Identities of the tensors that a node reads; tied weights are one."""
    for source in node.all_input_nodes:
        if source.op == "get_attr" and is_tensor_name(program.module, str(source.target)):
            yield id(tensor_of(program.module, str(source.target)))


def _layer(program: Program, group: _Group, costs: Cost) -> Layer:
    read = [costs.weights[name] for name in group.weights]
    trained = [weight for weight in read if weight.trainable]
    nodes = [costs.nodes[node.name] for node in group.nodes]
    encodings = [encoding_of(program, name) for name in _main_weights(group, costs)]
    return Layer(
        name=group.name,
        kind=group.kind,
        shapes=tuple(encoding.shape for encoding in encodings),
        encoding=" + ".join(dict.fromkeys(encoding.describe() for encoding in encodings)),
        parameters=sum(weight.elements for weight in trained),
        nonzeros=sum(weight.nonzeros for weight in trained),
        macs=sum(node.macs for node in nodes),
        nonzero_macs=sum(node.nonzero_macs for node in nodes),
        stored_bytes=sum(weight.stored_bytes for weight in read),
    )


def _main_weights(group: _Group, costs: Cost) -> list[str]:
    """The weights of convolutions and linear maps; where there are none, the largest weight."""
    operations = (weighted_operation(node) for node in group.nodes)
    multiplied = {str(operation.weight.target) for operation in operations if operation}
    main = [name for name in group.weights if name in multiplied]
    by_size = sorted(group.weights, key=lambda name: -costs.weights[name].elements)
    return main or by_size[:1]
