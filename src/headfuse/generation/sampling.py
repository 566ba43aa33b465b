"""How the next token is chosen from logits: on the device, from numbers that are drawn beforehand.

A row takes one uniform number a token, drawn on the host from a seed. Nothing of the choice depends then on the device,
on what else is in the batch, or on whether the step is replayed from a graph.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headfuse.errors import ConfigError

# Puts the rows of a batch on streams of their own, whatever seeds lie next to each other (2^64 / golden ratio).
SPREAD = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token. Then `top_k` likeliest tokens, then the fewest with mass `top_p`."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise ConfigError for what no distribution has."""
        if not self.temperature >= 0:
            raise ConfigError(f"wanted temperature >= 0, got {self.temperature}; raise it")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"wanted top-k of at least 1, got {self.top_k}; raise it or leave it out")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"wanted top-p above 0 and at most 1, got {self.top_p}; 1 keeps all tokens")

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature == 0


GREEDY = Sampling()


def choose(
    logits: Float[Tensor, "B V"], sampling: Sampling, uniform: Float[Tensor, "B"] | None = None
) -> Int64[Tensor, "B"]:
    """The next token of every row; `uniform` in [0, 1) decides where the cumulated probability is cut.

    Probabilities are fp64. Ties at the border of `top_k` go to whom `torch.topk` takes.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    assert uniform is not None
    scores, tokens = logits.double() / sampling.temperature, None
    if sampling.top_k is not None or sampling.top_p < 1:
        scores, tokens = scores.topk(min(sampling.top_k or scores.shape[-1], scores.shape[-1]))
    probabilities = torch.softmax(scores, -1)
    before = probabilities.cumsum(-1) - probabilities
    if sampling.top_p < 1:
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    cumulated = probabilities.cumsum(-1)
    target = uniform.double()[:, None] * cumulated[:, -1:]
    # Never past the last token of any probability, whatever rounding does.
    place = torch.minimum((cumulated <= target).sum(-1), (cumulated < cumulated[:, -1:]).sum(-1))
    return place if tokens is None else tokens.gather(-1, place[:, None])[:, 0]


def uniforms(rows: int, count: int, seed: int) -> Float[Tensor, "B N"]:
    """The numbers that `choose` wants for `count` tokens: a row's depend on its place and the seed alone."""
    generators = (torch.Generator().manual_seed((seed + row * SPREAD) % 2**63) for row in range(rows))
    return torch.stack([torch.rand(count, generator=each, dtype=torch.float64) for each in generators])
