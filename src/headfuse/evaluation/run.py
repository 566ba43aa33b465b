"""The `eval` stage: load a model, and another to compare with, and measure all that is asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from headfuse.checkpoints.loading import load_config, load_model, load_tokenizer, row_length, stored_dtype
from headfuse.checkpoints.source import Source, locate
from headfuse.checkpoints.validation import check_weights
from headfuse.errors import CheckpointError, ConfigError
from headfuse.evaluation.cache_bytes import cache_report
from headfuse.evaluation.exact_match import measure_exact_match
from headfuse.evaluation.report import EvaluationReport
from headfuse.evaluation.tasks import evaluate_tasks, find_tasks
from headfuse.evaluation.text_loss import measure_text_loss
from headfuse.placement import Placement
from headfuse.progress import Stages, silent
from headfuse.text.examples import load_examples
from headfuse.text.rows import count_row_bytes, load_tokens
from headfuse.text.tokenizer import agree

# Of the text, where nobody says how many.
TOKENS = 65_536


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | None = None,
    tokens: int | Literal["all"] | None = None,
    length: int | None = None,
    tasks: Sequence[str] = (),
    examples: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    placement: Placement | None = None,
    stages: Stages = silent,
) -> EvaluationReport:
    """Measure a model, stock or converted: text loss, distance to `against`, cache bytes, tasks, exact match.

    Of the text that many `tokens` are read, or all of it; None: 65,536, or all of a shorter text. Rows have `length`
    tokens; None: 1024, or as many as the model has positions for.
    `examples` is a source as `load_examples` takes it, of which the validation split is asked.
    Raises a HeadfuseError, before anything is measured, for anything that a user can cause.
    """
    device, precision = (placement or Placement()).resolve()
    asked, wanted = [] if examples is None else load_examples(examples, "val"), find_tasks(tasks)
    source, original = locate(str(model)), None if against is None else locate(str(against))
    check_weights(source.folder)
    length = row_length(load_config(source.folder), length)
    tokenizer = _tokenizer(source, original)
    if tokenizer is None and (tasks or asked):
        raise CheckpointError(f"{source.folder}: tasks want a tokenizer, the folder has none; copy it into the folder")
    judged = load_model(source, device=device)
    reference = None if original is None else load_model(original, device=device)
    rows = load_tokens(
        text,
        tokenizer,
        num_tokens=None if tokens == "all" else TOKENS if tokens is None else tokens,
        shorter=tokens is None,
        length=length,
        seed=seed,
        part="evaluation",
        vocab_size=judged.config.vocab_size,
    )
    row_bytes = None if tokenizer is None else count_row_bytes(rows.tokens, tokenizer)
    loss = measure_text_loss(
        judged, rows, reference=reference, row_bytes=row_bytes, precision=precision, progress=stages
    )
    found: dict[str, dict[str, Any]] = {}
    matches: dict[str, dict[str, Any]] = {}
    if tokenizer is not None:
        found = evaluate_tasks(judged, tokenizer, wanted, precision=precision, limit=limit, progress=stages)
        matches = measure_exact_match(judged, tokenizer, asked, precision=precision, limit=limit, progress=stages)
    cache = cache_report(judged.to(stored_dtype(source.folder)))  # type: ignore[arg-type]
    return EvaluationReport(source.public_name, loss.as_dict(), cache, found, matches)


def _tokenizer(source: Source, original: Source | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of both models; ConfigError if they have two, since ids of one are other words to the other."""
    own, other = load_tokenizer(source), None if original is None else load_tokenizer(original)
    if own is not None and other is not None and original is not None and not agree(own, other):
        raise ConfigError(
            f"{original.name}: wanted a model with the tokenizer of {source.name}, got another one; compare with the "
            "model that it was converted from"
        )
    return own or other
