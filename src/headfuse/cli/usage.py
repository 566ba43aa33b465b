"""What typer itself refuses (an unknown option, a bad value, a missing argument), in one line as everything else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from headfuse.errors import ConfigError

UsageError: Any = typer.BadParameter.__base__  # typer does not export it


class OneLineGroup(TyperGroup):
    """Commands whose usage errors are ConfigErrors; typer prints them as a box of five lines."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The options before the command; without any argument typer's error is the help, which stays."""
        if not args:
            return super().parse_args(ctx, args)
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse what follows the command's name and run it."""
        with _one_line(ctx):
            return super().invoke(ctx)


def message(error: Any) -> str:
    """What a usage error says, without its full stop."""
    return error.format_message().replace("Value error, ", "").removesuffix(".")


@contextmanager
def _one_line(context: Any) -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else f"{context.command_path} {context.invoked_subcommand}"
        raise ConfigError(f"{message(error)}; try `{path} --help`") from error
