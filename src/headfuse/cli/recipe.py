"""Recipes: the options of a command from a YAML file."""

import difflib
from pathlib import Path
from typing import Annotated

import typer
import yaml

from headfuse.cli.usage import message
from headfuse.errors import ConfigError


def take_recipe(context: typer.Context, path: Path | None) -> None:
    """Take the options of a command from a YAML file; those on the command line win."""
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: wanted a recipe, got {error}; give a YAML file of options") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: wanted options and their values, got {type(content).__name__}; write 'kv: 25%'")
    options = [each for each in context.command.params if not each.is_eager]  # a recipe names no other
    known = {option.removeprefix("--"): each for each in options for option in each.opts}
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(
                f"{path}: no option {name!r}; " + (f"did you mean {near[0]!r}?" if near else "see --help")
            )
        try:
            known[name].process_value(context, value)
        except typer.BadParameter as error:
            raise ConfigError(f"{path}: {message(error)}; change the recipe") from error
    context.default_map = {known[name].name: value for name, value in content.items()}


Recipe = Annotated[
    Path | None,
    typer.Option(help="YAML file of options, one a line.", callback=take_recipe, is_eager=True, expose_value=False),
]
