"""``shohin inspect``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli.options import AsJson, Data, InputShape
from shohin.cli.screen import lines, note, show, show_json
from shohin.errors import SpecError

if TYPE_CHECKING:
    from shohin.backends.tvm.binary import Binary
    from shohin.ir.program import Program


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .so, .shohin or .pt2 file, or a MODEL as for optimize.",
            show_default=False,
        ),
    ],
    steps: Annotated[
        bool, typer.Option("--steps", help="Of a .so: the steps, and the time each takes.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Of a model: its graph as text, and nothing else.")
    ] = False,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="SVG", help="Of a model: draw its graph.")
    ] = None,
    input_shape: InputShape = [],  # noqa: B006 - typer reads the default, nobody writes to it
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Show what a compiled model or a program is made of.

    \b
    Examples:
      shohin inspect net.shohin
      shohin inspect net.so --steps
      shohin inspect shohin.zoo:lenet5 --draw lenet5.svg
      shohin inspect net.shohin --text
    """  # noqa: D301 - \b keeps typer from joining the lines
    if file.endswith(".so"):
        if text or draw:
            raise SpecError(file, "a compiled model has no graph to show", "inspect its .shohin")
        _inspect_binary(file, steps, as_json)
        return
    if steps:
        raise SpecError(file, "has no steps before it is compiled", "inspect the .so")
    from shohin.cli.loading import load_data, load_model

    program = load_model(file, input_shape, load_data(data)).program
    if draw:
        _draw(program, draw)
    if text:
        _show_text(program, as_json)
        return
    _inspect_program(program, file, as_json)


def _inspect_program(program: "Program", file: str, as_json: bool) -> None:
    from shohin.ir.serialise import content_hash
    from shohin.layers import layer_grid, layers_of, totals_of

    size = Path(file).stat().st_size if Path(file).is_file() else None
    described: dict[str, Any] = {
        "name": program.name,
        "stage": program.stage.value,
        "facts": sorted(program.facts),
        "pipeline": ", ".join(program.history),
        "inputs": {spec.name: spec.describe() for spec in program.inputs},
        "file_bytes": size,
        "content_hash": content_hash(program),
    }
    if as_json:
        layers = [asdict(layer) for layer in layers_of(program)]
        show_json({**described, "totals": asdict(totals_of(program)), "layers": layers})
        return
    show(lines(_facts(described)), "", layer_grid(program).rich())
    show(f"peak activation memory at batch 1: {totals_of(program).peak_memory_bytes:,} bytes")


def _inspect_binary(file: str, steps: bool, as_json: bool) -> None:
    from shohin.backends.tvm.binary import Binary
    from shohin.cli.loading import random_inputs
    from shohin.tables import Grid

    binary = Binary.load(file)
    described = _describe_binary(binary, file)
    times: list[tuple[str, float]] = []
    if steps:
        arrays = [tensor.numpy() for tensor in random_inputs(binary.info.inputs)]
        times = binary.profile(arrays)
    if as_json:
        timed = [{"label": label, "milliseconds": round(time, 6)} for label, time in times]
        show_json({**described, **({"steps": timed} if steps else {})})
        return
    show(lines(_facts(described)))
    if steps:
        total = sum(time for _, time in times)
        rows = tuple(
            (str(index), label, f"{time:.4f}", f"{100 * time / total if total else 0:.1f} %")
            for index, (label, time) in enumerate(times)
        )
        heads = (">", "step", ">ms", ">share")
        show("", Grid("Steps", heads, rows, ("", "total", f"{total:.4f}", "")).rich())


def _describe_binary(binary: "Binary", file: str) -> dict[str, Any]:
    info = binary.info
    return {
        "name": info.name,
        "target": info.target,
        "pipeline": info.pipeline,
        "inputs": {spec.name: spec.describe() for spec in info.inputs},
        "outputs": {spec.name: spec.describe() for spec in info.outputs},
        "batch": info.batch,
        "arena_bytes": binary.arena_bytes,
        "constant_bytes": binary.constant_bytes,
        "file_bytes": Path(file).stat().st_size,
        "content_hash": info.content_hash,
        "tools": dict(info.tools),
    }


def _facts(described: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and texts of what is known, one line each."""
    facts = []
    for key, value in described.items():
        label = key.replace("_", " ")
        if isinstance(value, dict):
            joint = " " if key == "tools" else ": "
            facts.append((label, ", ".join(f"{name}{joint}{item}" for name, item in value.items())))
        elif isinstance(value, list):
            facts.append((label, ", ".join(value)))
        elif value is not None:
            facts.append((label, f"{value:,}" if isinstance(value, int) else str(value)))
    return facts


def _show_text(program: "Program", as_json: bool) -> None:
    from shohin.ir.printer import format_program

    text = format_program(program)
    if as_json:
        show_json({"text": text})
    else:
        show(text)


def _draw(program: "Program", path: Path) -> None:
    from shohin.cli.outputs import check_output
    from shohin.ir.drawing import draw

    check_output(path)
    draw(program, path)
    note(f"{path}: {path.stat().st_size:,} bytes")
