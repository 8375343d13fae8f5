"""``shohin run``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli.options import AsJson
from shohin.cli.screen import show, show_json

if TYPE_CHECKING:
    from shohin.backends.inputs import Array


def run(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A .so or .shohin file.", show_default=False)
    ],
    inputs: Annotated[
        list[Path],
        typer.Option(
            "--input",
            metavar="FILE",
            help="A .npy file for each input in order, or one .npz file with arrays by the names "
            "of the inputs.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the results here: .npy for one, or .npz."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a compiled model, or a program in PyTorch, on arrays from files.

    Axis 0 may be a multiple of the compiled batch; the model then runs batch by batch.

    \b
    Examples:
      shohin run net.so --input x.npy --output y.npy
      shohin run net.shohin --input inputs.npz --json
    """  # noqa: D301 - \b keeps typer from joining the lines
    from shohin.cli.arrays import (
        check_output_form,
        is_in_batches,
        load_artifact,
        read_arrays,
        write_arrays,
    )
    from shohin.cli.outputs import check_library, check_no_executable, check_output

    check_output(output)
    check_library(file)
    check_no_executable(file)
    arrays = read_arrays(inputs)
    artifact = load_artifact(file, arrays)
    names = [spec.name for spec in artifact.info.outputs]
    check_output_form(output, len(names))
    ordered = arrays.ordered(artifact.info.inputs)
    in_batches = is_in_batches(artifact.info, ordered)
    results = artifact.run_batches(ordered) if in_batches else artifact.run(ordered)
    found = dict(zip(names, results, strict=True))
    if output is not None:
        write_arrays(output, found)
    if as_json:
        described = {name: _describe(array, output is None) for name, array in found.items()}
        show_json({"outputs": described, "output": str(output) if output else None})
        return
    for name, array in found.items():
        sizes = ",".join(str(size) for size in array.shape)
        show(f"{name}: {array.dtype}[{sizes}]")
        if output is None:
            show(_preview(array))
    if output is not None:
        show(f"{output}: {output.stat().st_size:,} bytes")


def _describe(array: "Array", with_values: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if with_values:
        described["values"] = _finite(array.tolist())
    return described


def _finite(values: Any) -> Any:
    """Nested lists with texts for what JSON has no numbers for."""
    if isinstance(values, list):
        return [_finite(value) for value in values]
    is_number = not isinstance(values, float) or values - values == 0
    return values if is_number else str(values)


def _preview(array: "Array") -> str:
    import numpy as np

    return np.array2string(array, precision=5, threshold=40, edgeitems=3, max_line_width=100)
