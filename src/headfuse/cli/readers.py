"""Which methods read which options of `headfuse convert`."""

from collections.abc import Mapping

import typer

from headfuse.errors import ConfigError

TRAINED = ("dha", "align")  # the methods that train
_OF_TRAINING = (
    "data",
    "tokens",
    "init",
    "lm_weight",
    "rate",
    "update",
    "rows",
    "row_length",
    "micro_rows",
    "repeat",
    "compiled",
    "captured",
    "deterministic",
    "recompute",
    "save_every",
    "tensorboard",
    "wandb",
)
# The methods, or the sharing methods behind them, that read an option. All read the options that are not here.
READERS: Mapping[str, tuple[str, ...]] = dict.fromkeys(_OF_TRAINING, TRAINED) | {
    "teacher": ("align",),
    "search_share": ("dha",),
    "fusion_share": ("dha",),
    "criterion": ("procrustes",),
    "group_on": ("procrustes",),
    "restore_norm": ("mean-pool", "procrustes"),
}


def check_read(context: typer.Context, method: str, sharing: str) -> None:
    """Raise ConfigError if options were given, here or in a recipe, that neither the method nor its sharing reads."""
    unread: dict[tuple[str, ...], list[str]] = {}
    for option in context.command.params:
        readers = READERS.get(option.name or "")
        if readers is not None and _given(context, option.name) and not {method, sharing} & set(readers):
            unread.setdefault(readers, []).append(option.opts[0])
    if unread:
        listed = ", ".join(f"{', '.join(names)} (of {' and '.join(readers)})" for readers, names in unread.items())
        chosen = method if sharing == method else f"{method} ({sharing})"
        raise ConfigError(
            f"wanted options that method {chosen} reads, got {listed}; leave them out, or choose a --method or --init "
            "that reads them"
        )


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
