"""``shohin bench``."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli.options import AsJson, Data, InputShape
from shohin.cli.screen import note, show, show_json
from shohin.errors import SpecError
from shohin.progress import StepProgress

if TYPE_CHECKING:
    from shohin.cli.contest import Comparison


def bench(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A .so or .shohin file, or a MODEL as for optimize, which is compiled first.",
            show_default=False,
        ),
    ],
    versus: Annotated[
        str | None,
        typer.Option(
            "--versus",
            metavar="RIVALS",
            help="onnxruntime, openvino, torch, compile (torch.compile), separated by commas; "
            "torch when nothing is given and the model is known.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model that a .so was made from.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Threads for all; those of a .so, or 1."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Size of the batch axis; that of a .so, or 1."),
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option("--passes", metavar="PIPELINE", help="Passes to run before, e.g. fold-bn."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds to measure.")] = 30,
    budget: Annotated[
        float, typer.Option("--budget", min=0, help="Seconds to measure for at most.")
    ] = 20.0,
    input_shape: InputShape = [],  # noqa: B006 - typer reads the default, nobody writes to it
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Measure a compiled model, in turns with other runtimes at their best settings.

    \b
    Examples:
      shohin bench shohin.zoo:resnet20 --passes fold-bn --versus onnxruntime
      shohin bench net.shohin --versus torch --threads 2
      shohin bench net.so --model net.py:model --versus onnxruntime
    """  # noqa: D301 - \b keeps typer from joining the lines
    from shohin.cli.contest import Contestant, compare_with, compiled, loaded
    from shohin.cli.loading import load_data, load_model
    from shohin.cli.outputs import check_no_executable
    from shohin.rivals import check_rivals

    named = None if versus is None else [name.strip() for name in versus.split(",") if name.strip()]
    check_rivals(named or ())
    check_no_executable(file)
    is_library = file.endswith(".so")
    if is_library:
        _check_library(file, bool(named) and model is None, batch is not None, passes is not None)
    source = model if is_library else file
    found = load_model(source, input_shape, load_data(data)) if source else None
    contestant: Contestant
    if is_library:
        contestant = loaded(file, found, threads)
    elif found is not None:
        with StepProgress() as progress:
            contestant = compiled(found, passes, threads or 1, batch or 1, progress)
    names = named if named is not None else (["torch"] if found else [])
    comparison = compare_with(contestant, names, rounds, budget)
    if as_json:
        show_json(_plain(comparison))
        return
    show(comparison.title(), "", comparison.grid(), "", comparison.footer())
    for name, reason in comparison.failures.items():
        note(f"{name}: {reason}")


def _check_library(file: str, is_alone: bool, has_batch: bool, has_passes: bool) -> None:
    """Refuse what cannot be asked of a compiled model."""
    if is_alone:
        hint = "give --model net.py:model, or a .shohin file"
        raise SpecError(file, "a compiled model alone has nothing to compare with", hint)
    for option, is_given in (("--batch", has_batch), ("--passes", has_passes)):
        if is_given:
            raise SpecError(option, "a compiled model cannot change", "give a .shohin file")


def _plain(comparison: "Comparison") -> dict[str, Any]:
    from shohin.report import plain

    described = plain(asdict(comparison))
    return dict(described) if isinstance(described, dict) else {}
