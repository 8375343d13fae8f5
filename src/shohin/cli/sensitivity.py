"""``shohin sensitivity``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shohin.cli.names import load_callable
from shohin.cli.options import AsJson, Data, InputShape, Model
from shohin.cli.screen import note, show, show_json
from shohin.errors import SpecError

if TYPE_CHECKING:
    from shohin.passes.analyses.sensitivity import Sensitivity
    from shohin.tables import Grid


def sensitivity(
    model: Model,
    evaluate: Annotated[
        str,
        typer.Option(
            "--evaluate",
            metavar="NAME",
            help="file.py:name of a function that takes the module and gives a number, higher is "
            "better.",
            show_default=False,
        ),
    ],
    densities: Annotated[
        str | None,
        typer.Option(
            "--densities",
            metavar="NUMBERS",
            help="Shares of a layer's weights to keep, separated by commas; "
            "0.05,0.1,0.2,0.3,0.5,0.7,1 when nothing is given.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        list[str],
        typer.Option(
            "--weights",
            metavar="PATTERN",
            help="Name or shell pattern of the weights to prune; repeat it for several.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer reads the default, nobody writes to it
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the curves here, as CSV.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw the curves here: .png, .pdf or .svg."),
    ] = None,
    input_shape: InputShape = [],  # noqa: B006 - typer reads the default, nobody writes to it
    data: Data = None,
    workdir: Annotated[
        Path | None,
        typer.Option("--workdir", help="Folder that keeps every point once it is measured."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Take points from --workdir.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Measure how far each layer can be pruned: prune one alone, over a range of densities.

    \b
    Examples:
      shohin sensitivity net.py:model --input-shape 1x3x32x32 --evaluate net.py:accuracy
      shohin sensitivity net.shohin --evaluate net.py:accuracy --densities 0.1,0.3 \\
        -o curves.csv --plot curves.png --workdir run1
    """  # noqa: D301 - \b keeps typer from joining the lines
    import shohin
    from shohin.cli.loading import load_data, load_model
    from shohin.cli.outputs import check_output
    from shohin.passes.analyses.figures import check_figure
    from shohin.passes.analyses.sensitivity import DENSITIES

    for path in (output, plot):
        check_output(path)
    if plot is not None:
        check_figure(plot)
    chosen = DENSITIES if densities is None else _numbers(densities)
    measure = load_callable(evaluate, "--evaluate")
    found = load_model(model, input_shape, load_data(data))
    curves = shohin.sensitivity(
        found.program,
        measure,
        chosen,
        names=weights or None,
        workdir=workdir,
        resume=resume,
        progress=True,
    )
    if output is not None:
        curves.save_csv(output)
    if plot is not None:
        curves.draw(plot)
    if as_json:
        show_json(_plain(curves))
        return
    show(f"{found.program.name}: {curves.baseline:.6g} as it is", "", _grid(curves))
    written = [path for path in (output, plot) if path]
    for path in written:
        show(f"{path}: {path.stat().st_size:,} bytes")
    if not written:
        note("nothing was written: give -o curves.csv or --plot curves.png")


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        problem = f"expected numbers separated by commas, got '{text}'"
        raise SpecError("--densities", problem, "write 0.1,0.3,0.5") from error


def _grid(curves: "Sensitivity") -> "Grid":
    """The change of the measure, a row a weight and a column a density."""
    from shohin.tables import Grid

    densities = [density for density, _ in curves.layers[0].points] if curves.layers else []
    rows = tuple(
        (curve.weight, *(f"{found - curves.baseline:+.4g}" for _, found in curve.points))
        for curve in curves.layers
    )
    heads = tuple(f">{100 * density:g} %" for density in densities)
    return Grid("Change when only this is pruned", ("weight", *heads), rows)


def _plain(curves: "Sensitivity") -> dict[str, object]:
    from dataclasses import asdict

    from shohin.report import plain

    described = plain(asdict(curves))
    return dict(described) if isinstance(described, dict) else {}
