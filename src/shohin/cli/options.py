"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="file.py:name or package.module:name (a module or a factory of one), a .pt2 or a "
        ".shohin file.",
        show_default=False,
    ),
]
InputShape = Annotated[
    list[str],
    typer.Option(
        "--input-shape",
        metavar="SHAPE",
        help="Shape of an example input, e.g. 1x3x32x32, or int64\\[1x64] for other types; "
        "repeat it for several inputs.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help="file.py:name of an iterable, or of a function without arguments that gives one, of "
        "tuples of input tensors without labels.",
        show_default=False,
    ),
]
Evaluate = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        metavar="NAME",
        help="file.py:name of a function that takes the module and gives a number, higher is "
        "better.",
        show_default=False,
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        "--train",
        metavar="NAME",
        help="file.py:name of a function that trains the module it takes in place.",
        show_default=False,
    ),
]
Passes = Annotated[
    str,
    typer.Option(
        "--passes",
        metavar="PIPELINE",
        help='Passes separated by commas, e.g. "fold-bn, prune{density=0.1}"; see shohin passes.',
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="TARGET",
        help='Where it will run: "cpu{threads=2}", "arm{cpu=cortex-a72}".',
    ),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", help="Size of the batch axis.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
