"""``shohin compile``."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shohin.cli.options import AsJson, Batch, Data, InputShape, Model, Target
from shohin.cli.screen import lines, show, show_json
from shohin.progress import StepProgress

if TYPE_CHECKING:
    from shohin.backends.base import Artifact, ArtifactInfo

_NAMES = {
    "program": "program",
    "so": "shared library",
    "static": "static library",
    "object": "object file",
    "exe": "executable",
    "c-header": "header",
}


def compile_command(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="net.so is a shared library, net.a a static one, net.o an object, net an "
            "executable, net.h the header alone.",
            show_default=False,
        ),
    ],
    target: Target = "cpu",
    batch: Batch = 1,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            metavar="FORM",
            help="plain; or compressed: small in the file, made ready when it is first used.",
        ),
    ] = "plain",
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORM",
            help="so, static, object, exe or c-header; by default what the output's name says.",
        ),
    ] = None,
    libc: Annotated[
        str | None,
        typer.Option(
            "--libc",
            metavar="NAME",
            help="glibc, or musl for systems like Alpine; an executable holds musl by default.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model and prefix of its C symbols.")
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option("--passes", metavar="PIPELINE", help="Passes to run before, e.g. fold-bn."),
    ] = None,
    input_shape: InputShape = [],  # noqa: B006 - typer reads the default, nobody writes to it
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model to a library, an object or an executable that needs nothing else.

    \b
    Examples:
      shohin compile net.shohin -o net.so
      shohin compile net.shohin --target "cpu{threads=2}" --batch 8 -o net.a
      shohin compile shohin.zoo:resnet20 --passes fold-bn -o resnet20
      shohin compile net.shohin --weights compressed -o net
      shohin compile net.shohin --target "arm{cpu=cortex-a72}" --format exe -o net.arm
    """  # noqa: D301 - \b keeps typer from joining the lines
    from dataclasses import replace

    import shohin
    from shohin.backends.base import check_weight_form
    from shohin.cli.loading import load_data, load_model
    from shohin.cli.outputs import check_form, check_output

    check_output(output)
    check_form(output, form, libc)
    weight_form = check_weight_form(weights)
    program = load_model(model, input_shape, load_data(data)).program
    program = replace(program, name=name) if name else program
    if passes:
        program = shohin.optimize(program, passes, drift=False, progress=True).program
    started = time.perf_counter()
    with StepProgress() as progress:
        artifact = shohin.compile(
            program, target, batch=batch, weights=weight_form, progress=progress
        )
    seconds = time.perf_counter() - started
    artifact.save(output, form=form, libc=libc)
    described = describe_output(artifact, output, form)
    if as_json:
        show_json({**described, "compile_seconds": round(seconds, 3)})
        return
    kind = _NAMES[described["form"]]
    show(f"{output}: {described['bytes']:,} bytes, {kind} for {artifact.info.target}")
    show(lines(_facts(artifact, described, seconds)))


def describe_output(artifact: "Artifact", path: Path, form: str | None) -> dict[str, Any]:
    """What was written, as plain values."""
    from shohin.backends.tvm.forms import form_of

    info = artifact.info
    written = "program" if path.suffix == ".shohin" and not form else form_of(path, form)
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "form": written,
        "header": str(path.with_suffix(".h")) if written in ("so", "static", "object") else None,
        "target": info.target,
        "batch": info.batch,
        "inputs": {spec.name: spec.describe() for spec in info.inputs},
        "outputs": {spec.name: spec.describe() for spec in info.outputs},
        "arena_bytes": getattr(artifact, "arena_bytes", None),
        "weights": info.weights,
        "weight_bytes": info.weight_bytes,
        "constant_bytes": getattr(artifact, "constant_bytes", None),
        "content_hash": info.content_hash,
    }


def weights_text(info: "ArtifactInfo", in_memory: int) -> str:
    """Sizes of the weights, in the file and in memory."""
    if info.weights == "plain":
        return f"{in_memory:,} bytes"
    return f"{info.weight_bytes:,} bytes compressed, {in_memory:,} in memory"


def _facts(
    artifact: "Artifact", described: dict[str, Any], seconds: float
) -> list[tuple[str, str]]:
    info = artifact.info
    facts = [("  input", f"{spec.name}: {spec.describe()}") for spec in info.inputs]
    facts += [("  output", f"{spec.name}: {spec.describe()}") for spec in info.outputs]
    if described["constant_bytes"] is not None:
        facts.append(("  weights", weights_text(info, described["constant_bytes"])))
        facts.append(("  arena", f"{described['arena_bytes']:,} bytes"))
    facts.append(("  header", described["header"] or ""))
    facts.append(("  compiled in", f"{seconds:.1f} s"))
    return facts
