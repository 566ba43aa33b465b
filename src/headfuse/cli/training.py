"""Training options from the command line."""

from typing import TYPE_CHECKING, Any

from headfuse.cli.options import Update

if TYPE_CHECKING:
    from headfuse.training.options import TrainingOptions


def training_options(
    tokens: int, rows: int | None, length: int, rate: float, update: Update, **options: Any
) -> "TrainingOptions":
    """Training options with the defaults that depend on others."""
    from headfuse.training.options import TrainingOptions, rows_for
    from headfuse.training.processes import world_size

    return TrainingOptions(
        tokens=tokens,
        rows=rows or rows_for(tokens, length, world_size()),
        length=length,
        rate=rate,
        update=update.value,
        **options,
    )
