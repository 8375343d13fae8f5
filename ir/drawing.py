"""Drawings of programs: SVG, laid out in layers by Graphviz, coloured by encoding."""

import operator
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from os import PathLike

import pygraphviz
from torch import fx

from shohin.errors import VerifyError
from shohin.ir.annotations import ActivationFormat, Origin, annotation
from shohin.ir.encodings import Encoding
from shohin.ir.files import atomic_path
from shohin.ir.printer import format_target, format_type
from shohin.ir.program import Program, encoding_of, is_tensor_name
from shohin.ir.shapes import NodeType, symbolic_shapes

_INPUT, _PLAIN, _OTHER = "#d9d9d9", "#ffffff", "#d5c7e8"
_COLOURS = {
    "dense": "#c6dbef",
    "sparse": "#c7e9c0",
    "codebook": "#fdd0a2",
    "sparse of codebook": "#e3d58c",
    "fixed-point": "#fbb4b9",
    "ternary": "#b2e2e2",
}
_FONT = "Helvetica, Arial, sans-serif"


def draw(program: Program, path: str | PathLike[str]) -> None:
    """Write a drawing of a program's graph.

    A node shows its operator, the shape of its value, the module it comes from and the stored
    bytes of its weights; its colour says how its weights are stored. Weights and the sizes of
    axes are not drawn as nodes of their own.

    Args:
        program: the program; one whose shapes cannot be inferred is drawn without them.
        path: the SVG file.

    Raises:
        ArtifactError: when the file cannot be written.
    """
    text = render(program)
    with atomic_path(path) as temporary:
        temporary.write_bytes(text)


def render(program: Program) -> bytes:
    """The drawing of a program's graph as SVG text in UTF-8."""
    kinds: dict[str, str] = {}
    drawing = pygraphviz.AGraph(directed=True, strict=True)
    drawing.graph_attr.update(rankdir="TB", nodesep="0.25", ranksep="0.25", fontname=_FONT)
    drawing.node_attr.update(
        shape="box",
        style="rounded,filled",
        fontname=_FONT,
        fontsize="10",
        margin="0.12,0.05",
        height="0.35",
    )
    drawing.edge_attr.update(arrowsize="0.6", color="#555555")
    types = _infer(program)
    for node in program.graph.nodes:
        if _is_drawn(node, types):
            drawing.add_node(node.name, **_style(program, node, types, kinds))
    _add_edges(drawing, program.graph, types)
    drawing.graph_attr.update(label=_legend(program, kinds), labelloc="t")
    with _quiet_unless_failing():
        return bytes(drawing.draw(prog="dot", format="svg"))


@contextmanager
def _quiet_unless_failing() -> Iterator[None]:
    """Keep what C libraries write to standard error, and show it only when the block fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as heard:
        shown = os.dup(2)
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except BaseException:
            heard.seek(0)
            os.write(shown, heard.read())
            raise
        finally:
            os.dup2(shown, 2)
            os.close(shown)


def _infer(program: Program) -> dict[str, NodeType]:
    try:
        return symbolic_shapes(program)
    except VerifyError:
        return {}


def _is_drawn(node: fx.Node, types: Mapping[str, NodeType]) -> bool:
    scalar = isinstance(types.get(node.name), (int, str)) and bool(node.all_input_nodes)
    return node.op != "get_attr" and not scalar


def _add_edges(
    drawing: "pygraphviz.AGraph", graph: fx.Graph, types: Mapping[str, NodeType]
) -> None:
    for node in graph.nodes:
        for argument in node.all_input_nodes:
            if _is_drawn(node, types) and _is_drawn(argument, types):
                drawing.add_edge(argument.name, node.name)


def _style(
    program: Program, node: fx.Node, types: Mapping[str, NodeType], kinds: dict[str, str]
) -> dict[str, str]:
    encodings = _encodings(program, node)
    colour = _INPUT if node.op in {"placeholder", "output"} else _PLAIN
    if encodings:
        kind = _kind(max(encodings, key=Encoding.parameters))
        colour = _COLOURS.get(kind, _OTHER)
        kinds[kind] = colour
    lines = _lines(node, types, sum(encoding.stored_bytes() for encoding in encodings))
    return {"label": "\n".join(lines), "fillcolor": colour, "tooltip": node.name}


def _encodings(program: Program, node: fx.Node) -> list[Encoding]:
    names = [str(a.target) for a in node.all_input_nodes if a.op == "get_attr"]
    return [encoding_of(program, name) for name in names if is_tensor_name(program.module, name)]


def _kind(encoding: Encoding) -> str:
    inner = [_kind(child) for child in encoding.children().values()]
    named = [kind for kind in inner if kind != "dense"]
    return f"{encoding.kind} of {', '.join(named)}" if named else encoding.kind


def _lines(node: fx.Node, types: Mapping[str, NodeType], weight_bytes: int) -> list[str]:
    """What it does and gives, its format, where it comes from and what its weights take."""
    head, origin = [_title(node)], annotation(node, Origin)
    if node.name in types and node.op != "output":
        head.append(format_type(types[node.name]))
    lines, tail = ["  ".join(head)], []
    carried = annotation(node, ActivationFormat)
    if carried is not None:
        lines.append(f"{carried.bits} bits, fraction {carried.fraction}")
    if origin is not None and origin.module:
        tail.append(origin.module)
    if weight_bytes:
        tail.append(format_bytes(weight_bytes))
    return [*lines, ", ".join(tail)] if tail else lines


def _title(node: fx.Node) -> str:
    if node.op == "call_function":
        name = format_target(node.target).removeprefix("aten.")
        return f"[{node.args[1]}]" if node.target is operator.getitem else name
    return f"input {node.name}" if node.op == "placeholder" else "output"


def format_bytes(count: int) -> str:
    """A size as people read it: ``864 B``, ``2.3 KB``, ``44.6 MB``; a KB is 1000 bytes."""
    size, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _legend(program: Program, kinds: Mapping[str, str]) -> str:
    cells = "".join(
        f'<TD BGCOLOR="{colour}">{escape(kind)}</TD>' for kind, colour in sorted(kinds.items())
    )
    title = f"<B>{escape(program.name)}</B>"
    head = f'<TD BORDER="0">{title}, {program.stage.value}; weights:</TD>'
    plain = f'<TD BGCOLOR="{_PLAIN}">none</TD>'
    table = '<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="4" CELLPADDING="4">'
    return f"<{table}<TR>{head}{cells}{plain}</TR></TABLE>>"
