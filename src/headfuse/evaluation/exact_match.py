"""Exact match: the share of prompts after which greedy decoding writes the answer, letter for letter.

Rows are padded on the left, so that all go on from their last position at once; attention masks and positions see to it
that padding changes nothing.
"""

import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoints.loading import positions_of
from headfuse.errors import TextError
from headfuse.evaluation.inference import ends_of, measuring
from headfuse.evaluation.tasks import share
from headfuse.generation.decoding import Decoder, can_capture
from headfuse.precision import Precision
from headfuse.progress import Stages, silent
from headfuse.text.example_files import Example
from headfuse.text.examples import encode_examples, end_of_text


def measure_exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    precision: Precision = "fp32",
    batch_tokens: int = 16_384,
    limit: int | None = None,
    progress: Stages = silent,
) -> dict[str, dict[str, Any]]:
    """Results by task, JSON-ready, and behind several tasks the plain mean over them, "average".

    Of each task: the `questions`, the share of them that was answered exactly, and its standard error. `limit` keeps
    the first questions of each.
    Generated text and answer are compared without the spaces around them. A batch reads and writes at most
    `batch_tokens` tokens, padding included. Raises TextError if the tokenizer has no eos, or if a prompt cannot be
    fitted into the model's positions.
    """
    tasks: dict[str, list[Example]] = {}
    for example in examples:
        tasks.setdefault(example.task, []).append(example)
    found: dict[str, dict[str, Any]] = {}
    for name, all_questions in tasks.items():
        questions = all_questions[:limit]
        written = write_answers(
            model, tokenizer, questions, name, precision=precision, batch_tokens=batch_tokens, progress=progress
        )
        hits = [text == question.answer.strip() for text, question in zip(written, questions, strict=True)]
        found[name] = {"questions": len(questions)} | share("exact_match", hits)
    if len(found) > 1:
        shares = [values["exact_match"] for values in found.values()]
        asked = sum(values["questions"] for values in found.values())
        found["average"] = {"questions": asked, "exact_match": fmean(shares)}
    return found


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    name: str = "examples",
    *,
    precision: Precision = "fp32",
    batch_tokens: int = 16_384,
    progress: Stages = silent,
) -> list[str]:
    """What the model writes after each prompt, in the given order and without spaces around it.

    The likeliest token is taken until an eos (the tokenizer's or the model's), for at most as many tokens as the
    longest answer and its eos have. A prompt that leaves no room for them within the model's positions loses its start,
    with a warning. Raises what `measure_exact_match` raises. On a GPU steps are replayed from a graph, except in bf16:
    of autocast none is recorded.
    """
    encoded = encode_examples(examples, tokenizer)
    longest = max(one.ids.size - one.num_prompt for one in encoded)
    prompts = _fit([one.ids[: one.num_prompt].tolist() for one in encoded], model, longest, name)
    eos = end_of_text(tokenizer)
    ends = [eos, *ends_of(model)]
    lengths = [len(prompt) + longest for prompt in prompts]
    written: dict[int, str] = {}
    with measuring(model, precision=precision), progress(f"exact match {name}", len(prompts), "questions") as advance:
        batches = batches_by_length(lengths, batch_tokens, replayed=can_capture(model))
        for room, group in groupby(batches, lambda pair: pair[0]):
            decoder = Decoder(model, eos=ends, pad=eos, room=room)
            for _, batch in group:
                ids, mask = _padded([prompts[i] for i in batch], eos)
                rows = decoder.write(ids, mask, max_new_tokens=longest)
                texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                written.update(zip(batch, (text.strip() for text in texts), strict=True))
                advance(len(batch))
    return [written[i] for i in range(len(prompts))]


def batches_by_length(lengths: Sequence[int], batch_tokens: int, *, replayed: bool) -> Iterator[tuple[int, list[int]]]:
    """The tokens that a row of a batch has room for, and which rows are in it: the longest first.

    For steps that are `replayed`, rooms are few, and batches of the same room have as many rows, but for the very last:
    a step is recorded once for each room. Otherwise a room is what its longest row needs.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        longest = lengths[order[0]]
        room = _rounded(longest) if replayed else longest
        size = max(1, batch_tokens // room)
        batch, order = order[:size], order[size:]
        yield room, batch


def _rounded(tokens: int) -> int:
    """The next of a few lengths, four to each doubling and multiples of 16: at most a quarter or 15 are left over."""
    step = max(16, (1 << tokens.bit_length()) // 8)
    return -(-tokens // step) * step


def _padded(prompts: Sequence[list[int]], pad: int) -> tuple[Int64[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Prompts as one tensor, padded on the left, and where they are."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    gaps = torch.tensor([width - len(prompt) for prompt in prompts])
    return ids, torch.arange(width) >= gaps[:, None]


def _fit(prompts: list[list[int]], model: PreTrainedModel, new_tokens: int, name: str) -> list[list[int]]:
    """Drop the start of what does not fit into the model's positions with the answer behind it."""
    limit = positions_of(model.config)
    if limit is None:
        return prompts
    room = limit - new_tokens
    if room < 1:
        raise TextError(
            f"{name}: wanted answers shorter than the model's {limit} positions, got one of {new_tokens} tokens; leave "
            "it out, or use a model with more positions"
        )
    if count := sum(len(prompt) > room for prompt in prompts):
        warnings.warn(
            f"{name}: {count} of {len(prompts)} prompts exceed {room} positions and lose their start", stacklevel=4
        )
    return [prompt[-room:] for prompt in prompts]
