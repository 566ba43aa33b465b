"""Log-likelihood of continuations, in batches of requests of about the same length.

Rows are padded on the right, where a causal model cannot look; only the logits of the continuation are read.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import CheckpointError, TextError
from headfuse.evaluation.inference import forward_logits, measuring, positions_of, rows_per_batch
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


def encode_request(tokenizer: PreTrainedTokenizerBase, request: Request) -> EncodedRequest:
    """Tokenise context and continuation together, as they would be read, and cut where the context's tokens end.

    Spaces at the end of the context go to the continuation, as in lm-evaluation-harness. The text starts with the
    tokenizer's bos exactly if the tokenizer puts it there, or if there is no context. Raises TextError for an empty
    continuation, or an empty context where the tokenizer has neither bos nor eos.
    """
    context = request.context.rstrip()
    continuation = request.context[len(context) :] + request.continuation
    if not request.continuation:
        raise TextError(
            f"wanted a continuation of {request.context[-40:]!r}, got an empty string; repair the task file"
        )
    whole = _ids(tokenizer, context + continuation)
    num_context = min(len(_ids(tokenizer, context)), len(whole) - 1)
    start = _start(tokenizer, required=num_context == 0)
    return EncodedRequest((*start, *whole), len(start) + num_context)


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
    encoded = _fit([encode_request(tokenizer, request) for request in requests], model)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    vocab_size = model.config.get_text_config().vocab_size
    scores: dict[int, Score] = {}
    total = sum(len(one.ids) for one in encoded)
    with measuring(model, precision=precision), progress("score", total, "tokens") as advance:
        while len(scores) < len(order):
            longest = len(encoded[order[len(scores)]].ids)
            size = rows_per_batch(longest, vocab_size, batch_tokens)
            batch = order[len(scores) : len(scores) + size]
            scores.update(zip(batch, _score_batch(model, [encoded[i] for i in batch]), strict=True))
            advance(sum(len(encoded[i].ids) for i in batch))
    return [scores[i] for i in range(len(encoded))]


def _score_batch(model: PreTrainedModel, batch: list[EncodedRequest]) -> list[Score]:
    width = max(len(one.ids) for one in batch) - 1
    inputs = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, one in zip(inputs, batch, strict=True):
        row[: len(one.ids) - 1] = torch.tensor(one.ids[:-1])
    logits = forward_logits(model, inputs)
    found = []
    for row, one in zip(logits, batch, strict=True):
        targets = torch.tensor(one.ids[one.num_context :], device=row.device)
        chosen = row[one.num_context - 1 : len(one.ids) - 1].float()
        log_p = chosen.log_softmax(-1).gather(-1, targets[:, None]).double().sum()
        found.append(torch.stack([log_p, (chosen.argmax(-1) == targets).all().double()]))
    table = torch.stack(found).cpu()
    if not table.isfinite().all():
        raise CheckpointError("wanted finite logits, got NaN or infinity; the weights are broken or overflow, try bf16")
    return [Score(loglikelihood, bool(greedy)) for loglikelihood, greedy in table.tolist()]


def _fit(encoded: list[EncodedRequest], model: PreTrainedModel) -> list[EncodedRequest]:
    """Drop the start of what does not fit into the model's positions."""
    limit = positions_of(model)
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


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


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
