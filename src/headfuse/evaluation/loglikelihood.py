"""Log-likelihood of continuations, in batches of requests of about the same length.

Rows are padded on the right, where a causal model cannot look. Logits exist only in positions where a row of the batch
predicts its continuation.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoints.loading import positions_of
from headfuse.errors import CheckpointError, TextError
from headfuse.evaluation.inference import MAX_LOGIT_BYTES, forward_logits, measuring
from headfuse.evaluation.task_files import Request
from headfuse.precision import Precision
from headfuse.progress import Stages, silent


@dataclass(frozen=True)
class Score:
    """Natural log-likelihood of a continuation, and whether greedy decoding would write it."""

    loglikelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class EncodedRequest:
    """Token ids of context and continuation, and how many belong to the context (at least 1)."""

    ids: tuple[int, ...]
    num_context: int

    @property
    def predicting(self) -> range:
        """Positions whose logits are about the continuation."""
        return range(self.num_context - 1, len(self.ids) - 1)


def encode_requests(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request]) -> list[EncodedRequest]:
    """Tokenise context and continuation together, as they would be read, and cut where the context's tokens end.

    Spaces at the end of the context go to the continuation, as in lm-evaluation-harness. The text starts with the
    tokenizer's bos exactly if the tokenizer puts it there, or if there is no context. Raises TextError for an empty
    continuation, or an empty context where the tokenizer has neither bos nor eos.
    """
    for request in requests:
        if not request.continuation:
            raise TextError(
                f"wanted a continuation of {request.context[-40:]!r}, got an empty string; repair the task file"
            )
    contexts = _ids(tokenizer, [request.context.rstrip() for request in requests])
    wholes = _ids(tokenizer, [request.context + request.continuation for request in requests])
    counts = [min(len(context), len(whole) - 1) for context, whole in zip(contexts, wholes, strict=True)]
    starts = {required: _start(tokenizer, required=required) for required in {count == 0 for count in counts}}
    return [
        EncodedRequest((*(start := starts[count == 0]), *whole), len(start) + count)
        for count, whole in zip(counts, wholes, strict=True)
    ]


def score_requests(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    precision: Precision = "fp32",
    batch_tokens: int = 8192,
    progress: Stages = silent,
) -> list[Score]:
    """Score each request, in the given order.

    Contexts that exceed the model's positions lose their start, with a warning. Raises TextError for requests that
    cannot be scored, CheckpointError for logits that are not finite.
    """
    encoded = _fit(encode_requests(tokenizer, requests), model)
    vocab_size = model.config.get_text_config().vocab_size
    scores: dict[int, Score] = {}
    total = sum(len(one.ids) for one in encoded)
    with measuring(model, precision=precision), progress("score", total, "tokens") as advance:
        for batch in _batches(encoded, batch_tokens, MAX_LOGIT_BYTES // (4 * vocab_size)):
            chosen = [encoded[i] for i in batch]
            scores.update(zip(batch, _score_batch(model, chosen), strict=True))
            advance(sum(len(one.ids) for one in chosen))
    return [scores[i] for i in range(len(encoded))]


def _batches(encoded: Sequence[EncodedRequest], most_tokens: int, most_logits: int) -> Iterator[list[int]]:
    """Requests of about the same length, the longest first, with at most so many tokens and rows of logits or alone."""
    batch: list[int] = []
    kept = set[int]()
    for i in sorted(range(len(encoded)), key=lambda i: (-len(encoded[i].ids), encoded[i].num_context)):
        both, rows = kept.union(encoded[i].predicting), len(batch) + 1
        if batch and (rows * len(encoded[batch[0]].ids) > most_tokens or rows * len(both) > most_logits):
            yield batch
            batch, both = [], set(encoded[i].predicting)
        batch.append(i)
        kept = both
    if batch:
        yield batch


def _score_batch(model: PreTrainedModel, batch: Sequence[EncodedRequest]) -> list[Score]:
    inputs = torch.zeros(len(batch), max(len(one.ids) for one in batch) - 1, dtype=torch.int64)
    for row, one in zip(inputs, batch, strict=True):
        row[: len(one.ids) - 1] = torch.tensor(one.ids[:-1])
    rows = torch.tensor([row for row, one in enumerate(batch) for _ in one.predicting])
    targets = torch.tensor([token for one in batch for token in one.ids[one.num_context :]])
    kept, columns = torch.tensor([at for one in batch for at in one.predicting]).unique(return_inverse=True)
    logits = forward_logits(model, inputs, kept)
    chosen = logits[rows.to(logits.device), columns.to(logits.device)].float()
    expected = targets.to(logits.device)
    log_p = chosen.log_softmax(-1).gather(-1, expected[:, None])[:, 0]
    found = torch.stack([log_p.double(), (chosen.argmax(-1) != expected).double()], -1).cpu()
    table = torch.zeros(len(batch), 2, dtype=torch.float64).index_add_(0, rows, found)
    if not table.isfinite().all():
        raise CheckpointError("wanted finite logits, got NaN or infinity; the weights are broken or overflow, try bf16")
    return [Score(loglikelihood, others == 0) for loglikelihood, others in table.tolist()]


def _fit(encoded: list[EncodedRequest], model: PreTrainedModel) -> list[EncodedRequest]:
    """Drop the start of what does not fit into the model's positions."""
    limit = positions_of(model.config)
    if not limit:
        return encoded
    excess = [max(len(one.ids) - 1 - limit, 0) for one in encoded]
    for one, cut in zip(encoded, excess, strict=True):
        if one.num_context - cut < 1:
            raise TextError(
                f"wanted a continuation of at most {limit} tokens, got {len(one.ids) - one.num_context}; "
                "leave this task out, or use a model with more positions"
            )
    if count := sum(cut > 0 for cut in excess):
        warnings.warn(f"{count} of {len(encoded)} contexts exceed {limit} positions and lose their start", stacklevel=3)
    return [EncodedRequest(one.ids[cut:], one.num_context - cut) for one, cut in zip(encoded, excess, strict=True)]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text; equal texts, as the contexts of one question's choices are, are tokenised once."""
    distinct = list(dict.fromkeys(filter(None, texts)))
    ids = tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"] if distinct else []
    found = {"": []} | dict(zip(distinct, ids, strict=True))
    return [found[text] for text in texts]


def _start(tokenizer: PreTrainedTokenizerBase, *, required: bool) -> tuple[int, ...]:
    """The bos that the tokenizer itself would put before a text; if `required`, bos or eos in any case."""
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    added = tokenizer("a", verbose=False)["input_ids"][:1]
    if bos is not None and added == [bos]:
        return (bos,)
    if not required:
        return ()
    if bos is None and eos is None:
        raise TextError(
            "wanted a context, got an empty one and no bos or eos token to stand for it; repair the task file"
        )
    return (bos if bos is not None else eos,)
