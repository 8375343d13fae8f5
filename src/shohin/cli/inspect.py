"""``shohin inspect``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli.options import AsJson, Data, InputShape
from shohin.cli.outputs import check_library, is_executable
from shohin.cli.screen import lines, note, show, show_json
from shohin.errors import SpecError

if TYPE_CHECKING:
    from shohin.backends.base import ArtifactInfo
    from shohin.backends.tvm.binary import Binary
    from shohin.ir.program import Program
    from shohin.tables import Grid

_PROGRAM = ".shohin"


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .so, executable, .shohin or .pt2 file, or a MODEL as for optimize.",
            show_default=False,
        ),
    ],
    steps: Annotated[
        bool, typer.Option("--steps", help="Of a .so: the steps, and the time each takes here.")
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Of a model: its graph as text, and nothing else.")
    ] = False,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="SVG", help="Of a model: draw its graph.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="PNG",
            help="Of a .shohin: draw what pruning, sharing and coding left of the weights.",
        ),
    ] = None,
    formats: Annotated[
        Path | None,
        typer.Option(
            "--formats",
            metavar="JSON",
            help="Of a fixed-point model: write the formats and shifts of every operator.",
        ),
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
      shohin inspect net.shohin --plot bytes.png
      shohin inspect net.shohin --formats formats.json
    """  # noqa: D301 - \b keeps typer from joining the lines
    check_library(file)
    library = file.endswith(".so")
    if library or is_executable(file):
        if text or draw or plot or formats:
            problem = "a compiled model has neither a graph nor steps of compression to show"
            raise SpecError(file, problem, "inspect its .shohin")
        if library:
            _inspect_binary(file, steps, as_json)
            return
        if steps:
            raise SpecError(file, "an executable shows no steps", "run it with --profile")
        _inspect_unopened(_described_in(file), file, False, as_json, "")
        return
    if steps:
        raise SpecError(file, "has no steps before it is compiled", "inspect the .so")
    from shohin.cli.loading import load_data, load_model

    program = load_model(file, input_shape, load_data(data)).program
    if draw:
        _draw(program, draw)
    if plot:
        _plot(file, plot)
    if formats:
        _write_formats(program, file, formats)
    if text:
        _show_text(program, as_json)
        return
    _inspect_program(program, file, as_json)


def _inspect_program(program: "Program", file: str, as_json: bool) -> None:
    from shohin.ir.serialise import content_hash
    from shohin.layers import layer_grid, layers_of, totals_of
    from shohin.waterfall import waterfall

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
    falls = waterfall(file) if file.endswith(_PROGRAM) and program.encodings else None
    if as_json:
        layers = [asdict(layer) for layer in layers_of(program)]
        sizes = {"bytes": asdict(falls)} if falls else {}
        show_json({**described, "totals": asdict(totals_of(program)), "layers": layers, **sizes})
        return
    show(lines(_facts(described)), "", layer_grid(program))
    if falls:
        show("", falls.grid(), "")
    show(f"peak activation memory at batch 1: {totals_of(program).peak_memory_bytes:,} bytes")


def _plot(file: str, path: Path) -> None:
    from shohin.cli.outputs import check_output
    from shohin.waterfall import draw_waterfall, waterfall

    check_output(path)
    if not file.endswith(_PROGRAM):
        hint = "write the program to a .shohin file first"
        raise SpecError("--plot", "only a program file has bytes to draw", hint)
    draw_waterfall(waterfall(file), path)
    note(f"{path}: {path.stat().st_size:,} bytes")


def _write_formats(program: "Program", file: str, path: Path) -> None:
    from shohin.cli.outputs import check_output
    from shohin.ir.files import atomic_path
    from shohin.passes.fixed.export import formats_of

    check_output(path)
    found = formats_of(program)
    if not found:
        hint = "optimize it with --passes fixed-point"
        raise SpecError(file, "has no fixed-point operators", hint)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    note(f"{path}: {len(found)} operators")


def _inspect_binary(file: str, steps: bool, as_json: bool) -> None:
    from shohin.backends.tvm.binary import Binary
    from shohin.backends.tvm.target import host_runs

    info = _described_in(file)
    if problem := host_runs(info.tools.get("processor", "")):
        _inspect_unopened(info, file, steps, as_json, problem)
        return
    binary = Binary.load(file)
    described = describe_info(binary.info, file)
    described["arena_bytes"] = binary.arena_bytes
    described["constant_bytes"] = binary.constant_bytes
    timed = _timed_steps(binary) if steps else []
    if as_json:
        show_json({**described, **({"steps": timed} if steps else {})})
        return
    show(lines(_facts(described)))
    if steps:
        show("", _step_grid(timed))


def _described_in(file: str) -> "ArtifactInfo":
    """What the file of a compiled model says of itself."""
    from shohin.backends.tvm.manifest import info_of
    from shohin.backends.tvm.trailer import read_trailer

    info, _ = info_of(read_trailer(Path(file)), file)
    return info


def _inspect_unopened(
    info: "ArtifactInfo", file: str, steps: bool, as_json: bool, problem: str
) -> None:
    """Show what a binary says of itself; only a library for this machine can be asked for more."""
    described = describe_info(info, file)
    untimed = [{**asdict(step), "milliseconds": None} for step in info.steps]
    if as_json:
        show_json({**described, **({"steps": untimed} if steps else {})})
        return
    show(lines(_facts(described)))
    if steps:
        show("", _untimed_grid(untimed), f"not timed: {problem}")


def describe_info(info: "ArtifactInfo", file: str) -> dict[str, Any]:
    """What a compiled model says of itself, as plain values."""
    return {
        "name": info.name,
        "target": info.target,
        "pipeline": info.pipeline,
        "inputs": {spec.name: spec.describe() for spec in info.inputs},
        "outputs": {spec.name: spec.describe() for spec in info.outputs},
        "batch": info.batch,
        "file_bytes": Path(file).stat().st_size,
        "weights": info.weights,
        "weight_bytes": info.weight_bytes,
        "content_hash": info.content_hash,
        "tools": dict(info.tools),
        "needs": list(info.needs),
    }


def _timed_steps(binary: "Binary") -> list[dict[str, Any]]:
    from shohin.batches import noise

    arrays = [tensor.numpy() for tensor in noise(binary.info.inputs)]
    times = binary.profile(arrays)
    return [
        {**asdict(step), "milliseconds": round(time, 6)}
        for step, (_, time) in zip(binary.info.steps, times, strict=True)
    ]


def _step_grid(steps: list[dict[str, Any]]) -> "Grid":
    from shohin.tables import Grid

    total = sum(step["milliseconds"] for step in steps)
    rows: tuple[tuple[str, ...], ...] = tuple(
        (
            str(index),
            step["label"],
            step["kernel"],
            f"{step['milliseconds']:.4f}",
            f"{100 * step['milliseconds'] / total if total else 0:.1f} %",
            _speed(step),
            step["note"],
        )
        for index, step in enumerate(steps)
    )
    heads: tuple[str, ...] = (">", "step", "kernel", ">ms", ">share", ">GFLOP/s", "choice")
    footer: tuple[str, ...] = ("", "total", "", f"{total:.4f}", "", "", "")
    if not any(step["note"] for step in steps):
        rows, heads, footer = tuple(row[:-1] for row in rows), heads[:-1], footer[:-1]
    return Grid("Steps", heads, rows, footer, ("kernel", ">share", "choice"))


def _untimed_grid(steps: list[dict[str, Any]]) -> "Grid":
    from shohin.tables import Grid

    rows: tuple[tuple[str, ...], ...] = tuple(
        (str(index), step["label"], step["kernel"], step["note"])
        for index, step in enumerate(steps)
    )
    heads: tuple[str, ...] = (">", "step", "kernel", "choice")
    if not any(step["note"] for step in steps):
        rows, heads = tuple(row[:-1] for row in rows), heads[:-1]
    return Grid("Steps", heads, rows, (), ("kernel", "choice"))


def _speed(step: dict[str, Any]) -> str:
    """Billions of operations in a second, two for each multiply-accumulate."""
    if not step["macs"] or not step["milliseconds"]:
        return ""
    return f"{2 * step['macs'] / step['milliseconds'] / 1e6:.1f}"


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
