"""The calibration text, and the statistics of one pass over it, which other conversions of the same model can share."""

from dataclasses import dataclass
from pathlib import Path

from headfuse.checkpoints.loading import row_length
from headfuse.checkpoints.original import Original
from headfuse.conversion import Settings, gather_statistics, needs_unit_rows, reads_text
from headfuse.progress import Stages, silent
from headfuse.statistics.collect import load_statistics, save_statistics
from headfuse.statistics.moments import LayerStatistics
from headfuse.text.rows import TokenRows, load_tokens


@dataclass(frozen=True)
class Calibration:
    """The calibration text: a source as `load_tokens` takes it (None: built-in), cut into rows of `length` tokens.

    None: 1024, or as many as the model has positions for.
    """

    source: str | None = None
    tokens: int = 65536
    length: int | None = None

    def rows(self, original: Original, *, seed: int) -> TokenRows:
        """The rows for a model. Raises ConfigError if it has fewer positions, and what `load_tokens` raises."""
        return load_tokens(
            self.source,
            original.tokenizer,
            num_tokens=self.tokens,
            length=row_length(original.config, self.length),
            seed=seed,
            vocab_size=original.config.vocab_size,
        )


def shared_statistics(
    original: Original, rows: TokenRows, settings: Settings, folder: Path | None, stages: Stages = silent
) -> list[LayerStatistics] | None:
    """The statistics of these rows: read from `folder` if it holds them, else gathered and saved there.

    None if nothing would read them and no folder wants them.
    Raises ConfigError if `folder` holds those of another model or text, or cannot be written.
    """
    if folder is None and not reads_text(settings):
        return None
    identity = {
        "model": original.identity,
        "text": rows.digest(),
        "unit_rows": needs_unit_rows(original.loaded, settings),
        "precision": settings.precision,
    }
    if folder is not None and (found := load_statistics(folder, identity)) is not None:
        return found
    statistics = gather_statistics(original.loaded, rows.tokens, settings, stages)
    if folder is not None:
        save_statistics(folder, statistics, identity)
    return statistics
