"""``shohin bisect``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shohin.cli.names import load_callable
from shohin.cli.options import AsJson, Data, Evaluate, InputShape, Model, Passes, Train
from shohin.cli.screen import show, show_json

if TYPE_CHECKING:
    from shohin.passes.bisect import BisectResult


def bisect(
    model: Model,
    passes: Passes,
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", help="Largest absolute difference of an output allowed."),
    ] = 1e-3,
    evaluate: Evaluate = None,
    drop: Annotated[
        float, typer.Option("--drop", help="Largest fall of --evaluate's number allowed.")
    ] = 0.01,
    input_shape: InputShape = [],  # noqa: B006 - typer reads the default, nobody writes to it
    data: Data = None,
    train: Train = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every random choice.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Find the pass that breaks a model, and the layer where it does.

    Broken is a model whose outputs differ by more than --tolerance on the first batch; with
    --evaluate, one whose number falls by more than --drop. The exit code is 1 when a pass is found
    and 0 when none breaks the model.

    \b
    Examples:
      shohin bisect shohin.zoo:resnet20 --passes "fold-bn, prune" --tolerance 0.1
      shohin bisect net.py:model --passes prune --evaluate net.py:accuracy --drop 0.1
    """  # noqa: D301 - \b keeps typer from joining the lines
    from shohin.batches import Batches
    from shohin.cli.loading import load_data, load_model
    from shohin.passes.base import Context
    from shohin.passes.bisect import accuracy_check, output_check
    from shohin.passes.bisect import bisect as search
    from shohin.passes.pipeline import parse_pipeline

    pipeline = parse_pipeline(passes)
    found = load_model(model, input_shape, load_data(data))
    batches = Batches(load_data(data), found.program.inputs)
    measure = load_callable(evaluate, "--evaluate") if evaluate else None
    context = Context(
        calibration=batches,
        evaluate=measure,
        train=load_callable(train, "--train") if train else None,
        seed=seed,
    )
    if measure:
        check = accuracy_check(found.program, measure, drop)
    else:
        check = output_check(found.program, batches.first() or found.inputs, tolerance)
    result = search(found.program, pipeline, context, check)
    if as_json:
        show_json(_plain(result))
    else:
        show(str(result))
    if result.culprit is not None:
        raise typer.Exit(1)


def _plain(result: "BisectResult") -> dict[str, object]:
    from shohin.report import plain

    described = plain(asdict(result))
    return dict(described) if isinstance(described, dict) else {}
