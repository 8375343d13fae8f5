"""The ``shohin`` command: its subcommands, and how errors end it.

Modules of commands import PyTorch only when they run, so that ``shohin --help`` is quick.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shohin.cli.bench import bench
from shohin.cli.bisect import bisect
from shohin.cli.compile import compile_command
from shohin.cli.inspect import inspect
from shohin.cli.optimize import optimize
from shohin.cli.passes import passes
from shohin.cli.run import run
from shohin.cli.screen import one_line_warnings, print_error, print_failure
from shohin.cli.sensitivity import sensitivity
from shohin.cli.targets import targets
from shohin.errors import ShohinError

_INTERRUPTED = 130


class Shell(TyperGroup):
    """Runs a command; an error becomes a text of one screen and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            with one_line_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(_INTERRUPTED) from error
        except ShohinError as error:
            if ctx.params.get("debug"):
                raise
            print_error(error)
            raise typer.Exit(error.exit_code) from error
        except Exception as error:
            if ctx.params.get("debug") or _is_of_typer(error):
                raise
            print_failure(error)
            raise typer.Exit(1) from error


_EXIT_CODES = (
    "Exit codes: 0 success; 1 a pass that bisect found, or an error of the user's own code; "
    "2 wrong usage; 3 a model that cannot be captured; 4 a pass that fails; 5 an invalid program; "
    "6 operators that cannot be compiled; 7 a file that cannot be read or written; "
    "8 inputs that do not fit; 130 interrupted."
)

app = typer.Typer(
    epilog=_EXIT_CODES,
    cls=Shell,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("optimize")(optimize)
app.command("compile")(compile_command)
app.command("run")(run)
app.command("inspect")(inspect)
app.command("bench")(bench)
app.command("sensitivity")(sensitivity)
app.command("passes")(passes)
app.command("targets")(targets)
app.command("bisect")(bisect)


def main() -> None:
    """Run the command line."""
    app()


def _is_of_typer(error: Exception) -> bool:
    """Whether typer ends the command itself: exit, abort, wrong usage, a closed pipe."""
    return isinstance(error, (typer.Exit, typer.Abort, BrokenPipeError)) or hasattr(
        error, "format_message"
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        from shohin import __version__

        typer.echo(f"shohin {__version__}")
        raise typer.Exit


@app.callback()
def _group(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the whole traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Make trained neural networks small and fast: PyTorch model in, deployable binary out.

    \b
    shohin optimize net.py:model --passes "fold-bn, prune" -o net.shohin
    shohin compile net.shohin --target "cpu{threads=2}" -o net.so
    shohin run net.so --input x.npy --output y.npy
    """  # noqa: D301 - \b keeps typer from joining the lines
