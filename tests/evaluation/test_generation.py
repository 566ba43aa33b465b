"""Samples: greedy is greedy, seeds decide the rest, and the caller's random state stays."""

import pytest
import torch

from headfuse.errors import ConfigError
from headfuse.evaluation.generation import generate_text
from headfuse.generation.sampling import Sampling
from pico import logits_of, pico
from tiny_tokenizer import EOS, VOCABULARY, tiny_tokenizer

PROMPT = "the weather"


@pytest.fixture(scope="module")
def model():
    return pico("llama", vocab_size=VOCABULARY, bos_token_id=0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_temperature_zero_takes_the_likeliest_tokens(model, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(6):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert generate_text(model, tokenizer, PROMPT, max_new_tokens=6) == expected


def test_samples_follow_the_seed_and_leave_the_random_state(model, tokenizer):
    before = torch.get_rng_state()
    first, again, other = (
        generate_text(model, tokenizer, PROMPT, max_new_tokens=12, sampling=Sampling(1.0), seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(before, torch.get_rng_state())


def test_writing_ends_at_the_models_eos(model, tokenizer):
    model.generation_config.eos_token_id = list(range(VOCABULARY))
    try:
        assert len(generate_text(model, tokenizer, PROMPT, max_new_tokens=9).encode("utf-8", "replace")) <= 4
    finally:
        model.generation_config.eos_token_id = EOS


@pytest.mark.parametrize(
    ("count", "message"), [(0, "at least 1 new token"), (1000, "wanted at most 128 tokens, the model's positions")]
)
def test_impossible_lengths_are_errors(model, tokenizer, count, message):
    with pytest.raises(ConfigError, match=message):
        generate_text(model, tokenizer, PROMPT, max_new_tokens=count)


def test_a_prompt_without_tokens_is_an_error(model):
    with pytest.raises(ConfigError, match="wanted a prompt of at least one token"):
        generate_text(model, tiny_tokenizer(adds_bos=False), "", max_new_tokens=4)
