"""``shohin optimize``."""

from pathlib import Path
from typing import Annotated

import typer

from shohin.cli.names import load_callable
from shohin.cli.options import AsJson, Data, Evaluate, InputShape, Model, Passes, Train
from shohin.cli.screen import note, show, show_json


def optimize(
    model: Model,
    passes: Passes,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the program here, e.g. net.shohin."),
    ] = None,
    input_shape: InputShape = [],  # noqa: B006 - typer reads the default, nobody writes to it
    data: Data = None,
    evaluate: Evaluate = None,
    train: Train = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    workdir: Annotated[
        Path | None, typer.Option("--workdir", help="Folder for a checkpoint after every pass.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints in --workdir.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", help="Write the report here: .json, .md or .txt."),
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option("--dump", help="Folder to write the program to after every pass, as text."),
    ] = None,
    print_before: Annotated[
        list[str],
        typer.Option(
            "--print-before", metavar="PASS", help="Print the program before a pass, or 'all'."
        ),
    ] = [],  # noqa: B006 - typer reads the default, nobody writes to it
    print_after: Annotated[
        list[str],
        typer.Option(
            "--print-after", metavar="PASS", help="Print the program after a pass, or 'all'."
        ),
    ] = [],  # noqa: B006 - typer reads the default, nobody writes to it
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Verify the program after every pass.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Make a model smaller: run passes over it, and report what they did.

    \b
    Examples:
      shohin optimize shohin.zoo:resnet20 --passes "fold-bn, prune" -o net.shohin
      shohin optimize net.py:model --input-shape 1x3x32x32 --passes fold-bn
      shohin optimize net.py:model --data net.py:batches --train net.py:train \\
        --evaluate net.py:accuracy --passes "fold-bn, prune" --workdir run1
    """  # noqa: D301 - \b keeps typer from joining the lines
    import shohin
    from shohin.cli.loading import load_data, load_model
    from shohin.cli.outputs import check_output

    for path in (output, report):
        check_output(path)
    batches = load_data(data)
    measure = load_callable(evaluate, "--evaluate") if evaluate else None
    training = load_callable(train, "--train") if train else None
    found = load_model(model, input_shape, batches)
    result = shohin.optimize(
        found.program,
        passes,
        calibration=batches,
        evaluate=measure,
        train=training,
        seed=seed,
        workdir=workdir,
        resume=resume,
        verify_each=verify,
        print_before="all" if "all" in print_before else print_before,
        print_after="all" if "all" in print_after else print_after,
        dump=dump,
        progress=True,
    )
    if output is not None:
        result.save(output)
    if report is not None:
        result.report.save(report)
    if as_json:
        show_json({"output": str(output) if output else None, **result.report.to_json()})
        return
    show(*result.report.renderables())
    written = [path for path in (output, report) if path]
    for path in written:
        show(f"{path}: {path.stat().st_size:,} bytes")
    if not written:
        note("nothing was written: give -o net.shohin")
