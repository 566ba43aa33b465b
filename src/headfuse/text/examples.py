"""Examples of a prompt and its answer, from whatever the user names, as token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from headfuse.errors import TextError
from headfuse.text.example_files import Example, is_example_file, read_examples
from headfuse.text.task_mix import Split, is_task_mix, task_mix

EXAMPLES_PER_CALL = 512  # of the tokenizer


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of prompt, answer and end of text, and how many belong to the prompt."""

    ids: Int32[np.ndarray, "n"]
    num_prompt: int


def holds_examples(source: str | None) -> bool:
    """Whether a source has prompts and answers: a `.jsonl` file of them, or the task mix. All else is plain text."""
    if source is None:
        return False
    path = Path(source).expanduser()
    return is_task_mix(path) or is_example_file(path)


def load_examples(source: str, split: Split) -> list[Example]:
    """The examples of a `.jsonl` file, which has no splits, or of a split of the task mix (a wheel or a folder).

    Raises TextError if the source is neither, or not as it should be.
    """
    path = Path(source).expanduser()
    if is_task_mix(path):
        return task_mix(path, split)
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        got = "no such file" if not path.exists() else "a folder without it" if path.is_dir() else path.name
        raise TextError(f"{source}: wanted a .jsonl file of examples, or the task mix, got {got}; check the path")
    return read_examples(path)


def encode_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[EncodedExample]:
    """Token ids of each example, ended by the tokenizer's eos.

    The prompt is tokenised as it will be when the model is asked. The answer gets the tokens that it has behind the
    prompt, unless a token would cross the border: then it is tokenised alone. Raises TextError for a tokenizer without
    eos, of which a model could not learn to stop.
    """
    eos = end_of_text(tokenizer)
    encoded = []
    for block in _blocks(examples):
        prompts = encode_prompts([example.prompt for example in block], tokenizer)
        wholes = encode_prompts([example.text for example in block], tokenizer)
        for example, prompt, whole in zip(block, prompts, wholes, strict=True):
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
            else:
                answer = tokenizer(example.continuation, add_special_tokens=False, verbose=False)["input_ids"]
            encoded.append(EncodedExample(np.asarray([*prompt, *answer, eos], dtype=np.int32), len(prompt)))
    return encoded


def encode_prompts(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids with the special tokens that the tokenizer adds in front; an eos that it adds behind is left out.

    Raises TextError for a prompt without tokens.
    """
    eos = tokenizer.eos_token_id
    encoded = [list(ids) for ids in tokenizer(list(prompts), return_attention_mask=False, verbose=False)["input_ids"]]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if ids and ids[-1] == eos and not prompt.endswith(str(tokenizer.eos_token)):
            ids.pop()
        if not ids:
            raise TextError(f"wanted a prompt of at least one token, got none for {prompt[:40]!r}; rewrite it")
    return encoded


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an answer; TextError if the tokenizer has none."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise TextError(
            "wanted a tokenizer with an eos token to end answers with, got none; set eos_token in tokenizer_config.json"
        )
    return eos


def _blocks(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    return (examples[start : start + EXAMPLES_PER_CALL] for start in range(0, len(examples), EXAMPLES_PER_CALL))
