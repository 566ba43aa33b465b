"""The backends that torch.compile cannot look into, as operators of torch: schema, shapes and gradients.

`maps` are the tensors of `HeadMaps`, a `window` or `softcap` of 0 is none. Legend: B rows, H, K, V query, key and value
heads, T queries and d the head width.
"""

from typing import Any

import torch
from torch import Tensor

from headfuse.ops.decoupled_attention.grouped import grouped_decode
from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.rows import Rows
from headfuse.ops.decoupled_attention.scoring import Scoring

ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor[] maps, Tensor? lengths, Tensor? starts, Tensor? block_table, "
    "float scale, float softcap, int window"
)


def _described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: list[Tensor],
    lengths: Tensor | None,
    starts: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[tuple[Tensor, Tensor, Tensor, HeadMaps, Rows], Scoring]:
    """`ARGUMENTS` as the backends take them."""
    scoring = Scoring(scale, softcap or None, window or None)
    return (query, key, value, HeadMaps(*maps), Rows(lengths, starts, block_table)), scoring


@torch.library.custom_op("headfuse::grouped_decode", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def grouped_op(*arguments: Any) -> Tensor:
    """`grouped_decode`."""
    what, scoring = _described(*arguments)
    return grouped_decode(*what, scoring=scoring)


@torch.library.custom_op("headfuse::triton_decode", mutates_args=(), schema=f"({ARGUMENTS}) -> Tensor")
def decode_op(*arguments: Any) -> Tensor:
    """`decode_attention`, the output alone."""
    from headfuse.ops.decoupled_attention.decode import decode_attention

    what, scoring = _described(*arguments)
    return decode_attention(*what, scoring=scoring)[0]


@grouped_op.register_fake
@decode_op.register_fake
def _decoded(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("headfuse::triton_prefill", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)")
def prefill_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`prefill_attention`: output `[B, H, T, d]` and log-sum-exp `[B, H, T]`."""
    from headfuse.ops.decoupled_attention.prefill import prefill_attention

    what, scoring = _described(*arguments)
    return prefill_attention(*what, scoring=scoring)


@prefill_op.register_fake
def _prefilled(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, count, dim = query.shape
    lse = query.new_empty(batch, heads, count, dtype=torch.float32)
    return query.new_empty(batch, count, heads, dim).transpose(1, 2), lse


@torch.library.custom_op(
    "headfuse::triton_backward",
    mutates_args=(),
    schema=f"(Tensor gradient, Tensor out, Tensor lse, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def backward_op(gradient: Tensor, out: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`backward_attention`: the gradients of queries, keys and values."""
    from headfuse.ops.decoupled_attention.prefill import backward_attention

    (query, key, value, maps, rows), scoring = _described(*arguments)
    return backward_attention(gradient, (query, key, value, out, lse), maps, rows, scoring=scoring)


@backward_op.register_fake
def _gradients(
    _gradient: Tensor, _out: Tensor, _lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=dense),
        torch.empty_like(key, memory_format=dense),
        torch.empty_like(value, memory_format=dense),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, maps, lengths, starts, block_table, *ctx.scoring = inputs
    assert block_table is None, "a paged cache has no gradients"
    ctx.count = len(maps)
    ctx.save_for_backward(*output, query, key, value, lengths, starts, *maps)


def _backward(ctx: Any, gradient: Tensor, _of_lse: Tensor) -> tuple[Any, ...]:
    out, lse, query, key, value, lengths, starts, *maps = ctx.saved_tensors
    gradients = backward_op(gradient, out, lse, query, key, value, maps, lengths, starts, None, *ctx.scoring)
    return (*gradients, [None] * ctx.count, None, None, None, None, None, None)


prefill_op.register_autograd(_backward, setup_context=_keep)
