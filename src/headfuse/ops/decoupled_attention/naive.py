"""The specification: decoupled attention spelled out, in fp32 (fp64 for fp64 inputs).

B rows, H query heads, K key heads, V value heads, T queries, S keys, d head width.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring


def naive_attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K S d"],
    value: Float[Tensor, "B V S d"],
    maps: HeadMaps,
    *,
    lengths: Int[Tensor, "B"] | None = None,
    starts: Int[Tensor, "B"] | None = None,
    scoring: Scoring = PLAIN,
) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B H T"]]:
    """Causal attention of query head h over key head `maps.key[h]` and value head `maps.value[h]`, and its log-sum-exp.

    A row holds keys `starts[b] <= s < lengths[b]` (default: all) and its queries are the last T of them: query t has
    position `lengths[b] - T + t` and sees no later key. A query that sees no key gives zeros and -inf.
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = key[:, maps.key].to(exact), value[:, maps.value].to(exact)
    scores = query.to(exact) @ keys.transpose(2, 3) * scoring.scale_for(query.shape[-1])
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    seen = visible(query, key, lengths, starts, scoring.window)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0)[..., None])
    # An unseen value may be anything, as in the unused part of a static cache, and 0 * nan is nan.
    values = values.masked_fill(~seen.any(1)[:, None, :, None], 0)
    return (weights @ values).to(query.dtype), lse


def visible(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K S d"],
    lengths: Int[Tensor, "B"] | None,
    starts: Int[Tensor, "B"] | None,
    window: int | None,
) -> Bool[Tensor, "B T S"]:
    """Which keys each query sees."""
    rows, count, total = len(query), query.shape[2], key.shape[2]
    positions = torch.arange(total, device=query.device)
    ends = torch.full((rows,), total, device=query.device) if lengths is None else lengths.long()
    at = (ends[:, None] - count + torch.arange(count, device=query.device))[..., None]
    seen = positions <= at
    if starts is not None:
        seen = seen & (positions >= starts[:, None, None])
    return seen if window is None else seen & (positions > at - window)
