"""The options that say how many heads are left: each overrides those before it, and none may be dropped unseen."""

from itertools import permutations

import typer

from headfuse.errors import ConfigError

# A plan has groups, numbers of heads have counts, a share is spread by ourselves.
OVERRIDES = {"kv": 0, "kv_heads": 1, "key_heads": 1, "value_heads": 1, "plan": 2}


def check_one_budget(context: typer.Context) -> None:
    """Raise ConfigError for an option that another one would override; the command line may override a recipe."""
    firmness = {"COMMANDLINE": 2, "DEFAULT_MAP": 1}  # of a source; a default was not asked for at all
    sources = {name: context.get_parameter_source(name) for name in OVERRIDES}
    asked = {name: firmness.get(source.name, 0) for name, source in sources.items() if source is not None}
    for lost, kept in permutations(asked, 2):
        if OVERRIDES[lost] < OVERRIDES[kept] and asked[lost] >= asked[kept] > 0:
            raise ConfigError(f"wanted {_option(lost)} or {_option(kept)}, got both; leave one out")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
