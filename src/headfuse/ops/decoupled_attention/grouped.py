"""Decoding without a GPU: the query heads of one shared head are the rows of one matrix product.

Every key and value is read once and in place, in the folded cache too; nothing is repeated to the query heads. The
groups are filled up to the largest, which costs products but no reads. One row of the batch at a time: heads and rows
of a folded cache are no single batch of matrices, and each row then reads its own tokens alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.rows import ALL_TOKENS, Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring


def grouped_decode(
    query: Float[Tensor, "B H d"],
    key: Float[Tensor, "P K N d"],
    value: Float[Tensor, "P V N d"],
    maps: HeadMaps,
    rows: Rows = ALL_TOKENS,
    *,
    scoring: Scoring = PLAIN,
) -> Float[Tensor, "B H d"]:
    """Attention of one query a row, its last token; zeros for a row of no tokens. The host reads the rows' lengths."""
    key, value = rows.in_order(key), rows.in_order(value)
    batch, total = len(query), key.shape[2]
    lasts = [total] * batch if rows.lengths is None else rows.lengths.tolist()
    firsts = [0] * batch if rows.starts is None else rows.starts.tolist()
    if scoring.window is not None:
        firsts = [max(first, last - scoring.window) for first, last in zip(firsts, lasts, strict=True)]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        if first < last:
            out[row] = _one_row(query[row], key[row, :, first:last], value[row, :, first:last], maps, scoring)
    return out


def _one_row(
    query: Float[Tensor, "H d"],
    key: Float[Tensor, "K S d"],
    value: Float[Tensor, "V S d"],
    maps: HeadMaps,
    scoring: Scoring,
) -> Float[Tensor, "H d"]:
    queries = (query * scoring.scale_for(query.shape[-1]))[maps.key_slots]
    scores = queries @ key.transpose(1, 2)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    weights = torch.softmax(scores.flatten(0, 1), -1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = weights.to(value.dtype)[maps.value_slots]
    return (weights @ value).flatten(0, 1)[maps.out_slots]
