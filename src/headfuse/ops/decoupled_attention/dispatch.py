"""The one place that chooses how to compute decoupled attention: from the device, the shapes and what is asked for.

`HEADFUSE_ATTENTION=naive|sdpa|grouped|triton` overrides the choice. torch's flex_attention is no backend: compiled, it
returns wrong values where keys and values differ in heads (seen in torch 2.13).
"""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention.grouped import grouped_decode
from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.library import decode_op, grouped_op, prefill_op
from headfuse.ops.decoupled_attention.naive import naive_attention
from headfuse.ops.decoupled_attention.rows import ALL_TOKENS, Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring
from headfuse.ops.decoupled_attention.sdpa import sdpa_attention

OVERRIDE = os.environ.get("HEADFUSE_ATTENTION", "")
HAS_TRITON = find_spec("triton") is not None
# What the kernels take; the widest head fits their registers.
HEAD_DIMS = range(16, 257)
MAX_DECODED_HEADS = 128


def attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "P K N d"],
    value: Float[Tensor, "P V N d"],
    maps: HeadMaps,
    rows: Rows = ALL_TOKENS,
    *,
    scoring: Scoring = PLAIN,
) -> Float[Tensor, "B H T d"]:
    """Causal attention of query head h over key head `maps.key[h]` and value head `maps.value[h]`.

    A row's queries are the last T of its tokens. A query that sees no token gives zeros.

    Raises ConfigError if `HEADFUSE_ATTENTION` names no backend, or one that cannot compute this.
    """
    backend = OVERRIDE or chosen(query, key, value, rows, scoring)
    if backend not in BACKENDS:
        raise ConfigError(f"HEADFUSE_ATTENTION: wanted one of {', '.join(BACKENDS)}, got {backend!r}; set one of them")
    return BACKENDS[backend](query, key, value, maps, rows, scoring)


def chosen(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scoring: Scoring) -> str:
    """The name of a backend.

    Gradients, and more than one query outside of Hopper, go to torch's attention, whose tuned kernels outweigh the
    gather; only a soft-cap is beyond it.
    """
    learns, kernels = _learns(query, key, value), query.is_cuda and HAS_TRITON
    if query.shape[2] == 1 and not learns:
        fits = query.shape[-1] in HEAD_DIMS and query.shape[1] <= MAX_DECODED_HEADS
        return "triton" if kernels and fits else "grouped"
    if kernels and not learns and not torch.compiler.is_compiling():
        from headfuse.ops.decoupled_attention.prefill import suits_hopper

        if suits_hopper(query, key, value, rows, scoring):
            return "triton"
    if scoring.softcap is None:
        return "sdpa"
    return "triton" if kernels and query.shape[-1] in HEAD_DIMS else "naive"


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _naive(query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> Tensor:
    key, value = rows.in_order(key), rows.in_order(value)
    return naive_attention(query, key, value, maps, lengths=rows.lengths, starts=rows.starts, scoring=scoring)[0]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> Tensor:
    key, value = rows.in_order(key), rows.in_order(value)
    return sdpa_attention(query, key, value, maps, lengths=rows.lengths, starts=rows.starts, scoring=scoring)


def _grouped(query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> Tensor:
    if query.shape[2] > 1 or _learns(query, key, value):
        return _sdpa(query, key, value, maps, rows, scoring)
    if torch.compiler.is_compiling():
        return grouped_op(*_arguments(query[:, :, 0], key, value, maps, rows, scoring))[:, :, None]
    return grouped_decode(query[:, :, 0], key, value, maps, rows, scoring=scoring)[:, :, None]


def _triton(query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> Tensor:
    if query.shape[2] > 1 or _learns(query, key, value):
        return prefill_op(*_arguments(query, key, value, maps, rows, scoring))[0]
    return decode_op(*_arguments(query[:, :, 0], key, value, maps, rows, scoring))[:, :, None]


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor | None, Tensor | None, Tensor | None, float, float, int]:
    numbers = scoring.scale_for(query.shape[-1]), scoring.softcap or 0.0, scoring.window or 0
    return query, key, value, maps.tensors(), rows.lengths, rows.starts, rows.block_table, *numbers


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, HeadMaps, Rows, Scoring], Tensor]] = {
    "naive": _naive,
    "sdpa": _sdpa,
    "grouped": _grouped,
    "triton": _triton,
}
