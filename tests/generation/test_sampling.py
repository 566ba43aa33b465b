"""Choosing tokens: transformers' kept sets, the right frequencies, numbers that depend on seed and row alone."""

import pytest
import torch
from torch.testing import assert_close
from transformers import TopKLogitsWarper, TopPLogitsWarper

from headfuse.errors import ConfigError
from headfuse.generation.sampling import Sampling, choose, uniforms

DRAWS = 20_000


def frequencies(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token is chosen over an even grid of numbers."""
    grid = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    chosen = choose(logits.expand(DRAWS, -1), sampling, grid)
    return torch.bincount(chosen, minlength=logits.shape[-1]) / DRAWS


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_transformers_filters(temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    kept = logits / temperature
    if top_k is not None:
        kept = TopKLogitsWarper(top_k)(None, kept)
    if top_p < 1:
        kept = TopPLogitsWarper(top_p)(None, kept)
    wanted = torch.softmax(kept, -1)[0]
    found = frequencies(logits, Sampling(temperature, top_k, top_p))
    assert_close(found, wanted, atol=2 / DRAWS, rtol=0)
    assert not found[wanted == 0].any()


def test_no_number_leads_past_the_last_token_of_any_probability():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [-torch.inf, 0.0, -torch.inf]])
    top = torch.tensor([1 - 2**-53] * 2, dtype=torch.float64)
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.999)):
        assert choose(logits, sampling, top).tolist() == [1, 1]
        assert logits.gather(1, choose(logits, sampling, 0 * top)[:, None]).isfinite().all()


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(7, 11)
    assert torch.equal(choose(logits, Sampling(0.0, top_k=3)), logits.argmax(-1))


def test_numbers_depend_on_the_seed_and_the_row_alone():
    assert torch.equal(uniforms(3, 50, seed=1)[:2, :20], uniforms(2, 20, seed=1))
    drawn = torch.cat([uniforms(3, 50, seed=1), uniforms(3, 50, seed=2)])
    assert len({tuple(row) for row in drawn.tolist()}) == 6
    assert uniforms(2, 0, seed=0).shape == (2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "wanted temperature >= 0, got -1.0"),
        ({"temperature": float("nan")}, "wanted temperature >= 0, got nan"),
        ({"top_k": 0}, "wanted top-k of at least 1, got 0"),
        ({"top_p": 0.0}, "wanted top-p above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "wanted top-p above 0 and at most 1, got 1.5"),
    ],
)
def test_what_no_distribution_has_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
