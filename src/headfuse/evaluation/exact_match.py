"""Exact match: the share of prompts after which greedy decoding writes the answer, letter for letter.

Rows are padded on the left, so that all go on from their last position at once; attention masks and positions see to it
that padding changes nothing.
"""

import warnings
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import TextError
from headfuse.evaluation.inference import device_of, measuring
from headfuse.evaluation.tasks import share
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
    with a warning. Raises what `measure_exact_match` raises.
    """
    encoded = encode_examples(examples, tokenizer)
    longest = max(one.ids.size - one.num_prompt for one in encoded)
    prompts = _fit([one.ids[: one.num_prompt].tolist() for one in encoded], model, longest, name)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    options = _greedy(model, tokenizer, longest)
    written: dict[int, str] = {}
    with measuring(model, precision=precision), progress(f"exact match {name}", len(prompts), "questions") as advance:
        while len(written) < len(order):
            width = len(prompts[order[len(written)]])
            size = max(1, batch_tokens // (width + longest))
            batch = order[len(written) : len(written) + size]
            written.update(zip(batch, _continue(model, tokenizer, [prompts[i] for i in batch], options), strict=True))
            advance(len(batch))
    return [written[i] for i in range(len(prompts))]


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], options: GenerationConfig
) -> list[str]:
    width, device = max(map(len, prompts)), device_of(model)
    ids = torch.full((len(prompts), width), int(options.pad_token_id))
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    generate: Any = model.generate  # declared as a tensor by nn.Module
    output = generate(ids.to(device), attention_mask=mask.to(device), generation_config=options)
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """The likeliest token always, whatever the model's own settings ask for."""
    eos = end_of_text(tokenizer)
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {eos, *(own if isinstance(own, list) else [] if own is None else [own])}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=sorted(ends),
        pad_token_id=eos,
    )


def _fit(prompts: list[list[int]], model: PreTrainedModel, new_tokens: int, name: str) -> list[list[int]]:
    """Drop the start of what does not fit into the model's positions with the answer behind it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limit:
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
