"""Decoding without a GPU: the query heads of one shared head are the rows of one matrix product.

Every key and value is read once and in place, in the folded cache too; nothing is repeated to the query heads. The
groups are filled up to the largest, which costs products but no reads.

Where keys and values have the same groups and all rows the same tokens, this is one call of torch's attention, with a
group for its queries. Else each row of the batch has two products: heads and rows of a folded cache are no single batch
of matrices, and each row then reads its own tokens alone. A short context costs calls, not reads: what the rows can
share is done once, and what would change nothing is left out.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

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
    spans = _spans(rows, len(query), key.shape[2], scoring.window)
    scale = scoring.scale_for(query.shape[-1])
    by_key = query if maps.consecutive else query.index_select(1, maps.key_slots.flatten())
    queries = by_key.unflatten(1, maps.key_slots.shape)
    if scoring.softcap is None and len(set(spans)) == 1 and torch.equal(maps.key, maps.value):
        key, value = _cut(key, *spans[0]), _cut(value, *spans[0])
        sums = F.scaled_dot_product_attention(queries, key, value, scale=scale)
    else:
        queries = queries * scale
        sums = torch.stack(
            [
                _of_one_row(queries[row], _cut(key[row], *span), _cut(value[row], *span), maps, scoring.softcap)
                for row, span in enumerate(spans)
            ]
        )
    by_value = sums.flatten(1, 2)
    return by_value if maps.consecutive else by_value.index_select(1, maps.out_slots)


def _spans(rows: Rows, batch: int, total: int, window: int | None) -> list[tuple[int, int]]:
    """The first token of each row and the end of its tokens."""
    lasts = [total] * batch if rows.lengths is None else rows.lengths.tolist()
    firsts = [0] * batch if rows.starts is None else rows.starts.tolist()
    if window is not None:
        firsts = [max(first, last - window) for first, last in zip(firsts, lasts, strict=True)]
    return list(zip(firsts, lasts, strict=True))


def _cut(heads: Float[Tensor, "*B n N d"], first: int, last: int) -> Float[Tensor, "*B n S d"]:
    # A slice that changes nothing costs as much as a small operator, and each row has two.
    return heads if last - first == heads.shape[-2] else heads[..., first:last, :]


def _of_one_row(
    queries: Float[Tensor, "K g d"],
    key: Float[Tensor, "K S d"],
    value: Float[Tensor, "V S d"],
    maps: HeadMaps,
    softcap: float | None,
) -> Float[Tensor, "V h d"]:
    scores = torch.bmm(queries, key.mT)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    weights = torch.softmax(scores, -1).flatten(0, 1)
    return torch.bmm(F.embedding(maps.value_slots, weights), value)
