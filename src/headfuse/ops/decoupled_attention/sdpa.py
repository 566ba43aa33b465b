"""Gather the heads by their maps, then torch's scaled-dot-product attention.

Memory of an attention without sharing, for one layer at a time; its backward sums the gathered heads' gradients into
the shared ones in fp32 and in a fixed order, which the `index_add` of autograd does not.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.naive import visible
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring


class GatherHeads(torch.autograd.Function):
    """`heads[:, index]`, whose gradient is a sum in fp32 (fp64 for fp64), in the order of the query heads."""

    @staticmethod
    def forward(ctx: Any, heads: Float[Tensor, "B n S d"], index: Int[Tensor, "H"]) -> Float[Tensor, "B H S d"]:
        """The heads that the query heads read."""
        ctx.save_for_backward(index)
        ctx.num_heads = heads.shape[1]
        return heads[:, index]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Float[Tensor, "B n S d"], None]:
        """A product with the 0/1 matrix of the map: exact terms, fp32 sums, no atomics."""
        (index,), gradient = ctx.saved_tensors, gradients[0]
        reads = torch.arange(ctx.num_heads, device=index.device)[:, None] == index
        total = reads.to(gradient.dtype) @ gradient.flatten(2)
        return total.unflatten(2, gradient.shape[2:]), None


def sdpa_attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "B K S d"],
    value: Float[Tensor, "B V S d"],
    maps: HeadMaps,
    *,
    lengths: Int[Tensor, "B"] | None = None,
    starts: Int[Tensor, "B"] | None = None,
    scoring: Scoring = PLAIN,
) -> Float[Tensor, "B H T d"]:
    """As `naive_attention`, without the log-sum-exp.

    Raises ConfigError for a soft-cap, which torch's attention does not know.
    """
    if scoring.softcap is not None:
        raise ConfigError("softcap: torch's attention has none; use the naive or the triton backend")
    seen = None
    if (
        lengths is not None
        or starts is not None
        or scoring.window is not None
        or query.shape[2] not in (1, key.shape[2])
    ):
        seen = visible(query, key, lengths, starts, scoring.window)
        # What no query sees may be anything, as in the unused part of a static cache, and 0 * nan is nan.
        unseen = ~seen.any(1)[:, None, :, None]
        key, value = key.masked_fill(unseen, 0), value.masked_fill(unseen, 0)
    out = F.scaled_dot_product_attention(
        query,
        gather(key, maps.key),
        gather(value, maps.value),
        attn_mask=None if seen is None else seen[:, None],
        is_causal=seen is None and query.shape[2] > 1,
        scale=scoring.scale_for(query.shape[-1]),
    )
    return out if seen is None else out.masked_fill(~seen.any(2)[:, None, :, None], 0)


def gather(heads: Float[Tensor, "B n S d"], index: Int[Tensor, "H"]) -> Float[Tensor, "B H S d"]:
    """The heads that the query heads read, with the gradient of `GatherHeads`."""
    gathered = GatherHeads.apply(heads, index)
    assert isinstance(gathered, Tensor)
    return gathered
