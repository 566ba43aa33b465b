"""The command line: parse, call one stage, print. Results go to standard output, progress to standard error."""

import sys
import warnings

import typer

from headfuse.cli.convert import convert
from headfuse.cli.evaluate import evaluate
from headfuse.cli.heal import heal
from headfuse.cli.look import demo, inspect
from headfuse.cli.serve import bench, generate
from headfuse.cli.usage import OneLineGroup
from headfuse.errors import HeadfuseError

app = typer.Typer(
    name="headfuse",
    cls=OneLineGroup,
    help="Turn a transformer checkpoint with many key/value heads into one with few.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
app.command()(inspect)
app.command()(convert)
app.command()(heal)
app.command("eval")(evaluate)
app.command()(generate)
app.command()(bench)
app.command()(demo)

INTERRUPTED = 130  # exit status of a command that Ctrl-C ended


def main() -> None:
    """Run the command line; errors a user can cause are one line and exit status 2, warnings are one line."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        app(standalone_mode=True)
    except HeadfuseError as error:
        sys.stderr.write(f"headfuse: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into it without a word
            sys.stderr.write(f"headfuse: interrupted; {_kept(end) or 'nothing was left behind'}\n")
        raise


def _kept(error: BaseException | None) -> str:
    """What an error, or one that led to it, says of a run that can be resumed."""
    notes: list[str] = []
    while error is not None:
        notes += getattr(error, "__notes__", [])
        error = error.__cause__ or error.__context__
    return "; ".join(notes)
