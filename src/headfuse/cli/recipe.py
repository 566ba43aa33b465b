"""Recipes: the options of a command from a YAML file."""

import difflib
from pathlib import Path
from typing import Annotated

import typer
import yaml

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
    known = {option.removeprefix("--"): p.name for p in context.command.params for option in p.opts}
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise ConfigError(
                f"{path}: no option {name!r}; " + (f"did you mean {near[0]!r}?" if near else "see --help")
            )
    context.default_map = {known[name]: value for name, value in content.items()}


Recipe = Annotated[
    Path | None,
    typer.Option(help="YAML file of options, one a line.", callback=take_recipe, is_eager=True, expose_value=False),
]
