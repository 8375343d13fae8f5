"""The textual form of a program: stable, so that tests can compare it."""

import operator
from collections.abc import Mapping

import torch
from torch import fx
from torch._ops import OpOverload

from shohin.errors import VerifyError
from shohin.ir.annotations import ActivationFormat, Origin, annotation, annotations
from shohin.ir.program import Program, encoding_of, weight_names
from shohin.ir.shapes import NodeType, TensorType, symbolic_shapes


def format_program(program: Program, shapes: bool = True) -> str:
    """The text of a program: one line a node, then one line a weight.

    Args:
        program: the program.
        shapes: infer and show the type of every value. A program whose shapes cannot be inferred
            is printed without.

    Returns:
        Text without a newline at its end::

            program net [captured; functional]
              %x: float32[N,3] = input
              %fc: float32[N,2] = aten.linear(%x, @fc.weight, @fc.bias)  # fc: Linear
              return %fc
            weights
              @fc.weight: float32[2,3] dense (24 bytes)
              @fc.bias: float32[2] dense (8 bytes)
    """
    types = _infer(program) if shapes else {}
    facts = ", ".join(sorted(program.facts))
    stage = f"{program.stage.value}; {facts}" if facts else program.stage.value
    lines = [f"program {program.name} [{stage}]"]
    lines += [f"  {format_node(n, types)}" for n in program.graph.nodes if n.op != "get_attr"]
    names = weight_names(program)
    if names:
        lines.append("weights")
    lines += [f"  {_format_weight(program, name)}" for name in names]
    return "\n".join(lines)


def format_node(node: fx.Node, types: Mapping[str, NodeType] | None = None) -> str:
    """One line for one node.

    Args:
        node: the node.
        types: the type of every value, by node name; may lack some.
    """
    if node.op == "output":
        results = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
        return "return " + ", ".join(_format_value(result) for result in results)
    name = f"%{node.name}{_format_type(node, types or {})}{_format_annotations(node)}"
    return f"{name} = {_format_call(node)}{_format_origin(node)}"


def format_type(kind: NodeType) -> str:
    """The type of a value: ``float32[N,3]``, a size, or these in parentheses."""
    if isinstance(kind, TensorType):
        return kind.describe()
    if isinstance(kind, tuple):
        return f"({', '.join(format_type(item) for item in kind)})"
    return str(kind)


def format_target(target: object) -> str:
    """The name of an operator, without the ``.default`` that says nothing."""
    if isinstance(target, OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _infer(program: Program) -> dict[str, NodeType]:
    try:
        return symbolic_shapes(program)
    except VerifyError:
        return {}


def _format_type(node: fx.Node, types: Mapping[str, NodeType]) -> str:
    return f": {format_type(types[node.name])}" if node.name in types else ""


def _format_annotations(node: fx.Node) -> str:
    shown = [_format_annotation(item) for item in annotations(node) if not isinstance(item, Origin)]
    return f" <{'; '.join(shown)}>" if shown else ""


def _format_annotation(carried: object) -> str:
    if isinstance(carried, ActivationFormat):
        return f"{carried.bits} bits, fraction {carried.fraction}"
    return repr(carried)


def _format_origin(node: fx.Node) -> str:
    origin = annotation(node, Origin)
    if origin is None:
        return ""
    kind = f": {origin.module_type}" if origin.module_type and origin.module else ""
    parts = [f"{origin.module}{kind}"] if origin.module else []
    if origin.made_by:
        replaced = f" from {', '.join(origin.replaced)}" if origin.replaced else ""
        parts.append(f"by {origin.made_by}{replaced}")
    return f"  # {', '.join(parts)}" if parts else ""


def _format_call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"@{node.target}"
    if node.target is operator.getitem:
        return f"{_format_value(node.args[0])}[{_format_value(node.args[1])}]"
    return f"{format_target(node.target)}({', '.join(_format_arguments(node))})"


def _format_arguments(node: fx.Node) -> list[str]:
    """Arguments by position up to the first that is no value of the graph, then by name."""
    schema = node.target._schema.arguments if isinstance(node.target, OpOverload) else []
    texts, named = [], False
    for index, value in enumerate(node.args):
        parameter = schema[index] if index < len(schema) else None
        named = named or not _is_value(value)
        if parameter is None or not named:
            texts.append(_format_value(value))
        elif not _is_default(parameter, value):
            texts.append(f"{parameter.name}={_format_value(value)}")
    return [*texts, *_format_keywords(node, schema)]


def _format_keywords(node: fx.Node, schema: list[torch.Argument]) -> list[str]:
    defaults = {parameter.name: parameter for parameter in schema}
    return [
        f"{name}={_format_value(value)}"
        for name, value in node.kwargs.items()
        if name not in defaults or not _is_default(defaults[name], value)
    ]


def _is_value(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_value(item) for item in value)
    return isinstance(value, fx.Node)


def _is_default(parameter: torch.Argument, value: object) -> bool:
    if not parameter.has_default_value() or isinstance(value, fx.Node) or _is_value(value):
        return False
    default = parameter.default_value
    if isinstance(default, (tuple, list)):
        return isinstance(value, (tuple, list)) and list(default) == list(value)
    return type(default) is type(value) and bool(default == value)


def _format_value(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_format_value(item) for item in value)}]"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device) else repr(value)


def _format_weight(program: Program, name: str) -> str:
    encoding = encoding_of(program, name)
    kind = TensorType(encoding.shape, encoding.dtype).describe()
    return f"@{name}: {kind} {encoding.describe()} ({encoding.stored_bytes()} bytes)"
