"""Many queries a row against their own tokens or a cache, and the gradients: the launchers of these kernels.

No key or value is repeated to the query heads, in memory or in the gradients.
"""

# Triton adds launch options to a kernel's own arguments.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention.backward_kernel import query_gradient_kernel, shared_gradient_kernel
from headfuse.ops.decoupled_attention.decode import HEAD_DIMS, LOG2E, aligned
from headfuse.ops.decoupled_attention.head_maps import HeadMaps, tile
from headfuse.ops.decoupled_attention.prefill_kernel import prefill_kernel
from headfuse.ops.decoupled_attention.rows import ALL_TOKENS, Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring
from headfuse.ops.hopper import on_hopper

# Queries and tokens of a tile, stages and warps, for heads of up to 128 and of up to 256 channels.
SIZES = {
    "out": ((128, 64, 3, 8), (128, 32, 2, 8)),
    "query": ((64, 64, 2, 4), (64, 32, 2, 4)),
    "shared": ((32, 128, 2, 8), (32, 64, 2, 8)),
}
FP32_SIZES = (16, 32, 2, 4)
# What the kernel for Hopper is made for: widths, tokens of a tile, tiles under way. Fewer queries waste its groups.
HOPPER_DIMS, HOPPER_BLOCK, HOPPER_STAGES, HOPPER_QUERIES = (64, 128), 128, 2, 64
Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def prefill_attention(
    query: Float[Tensor, "B H T d"],
    key: Float[Tensor, "P K N d"],
    value: Float[Tensor, "P V N d"],
    maps: HeadMaps,
    rows: Rows = ALL_TOKENS,
    *,
    scoring: Scoring = PLAIN,
) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B H T"]]:
    """As `naive_attention`, also against pages: causal attention of each row's last T tokens, and the log-sum-exp.

    The output lies in memory as `[B, T, H, d]`, as the projection behind it wants it.

    Raises ConfigError for a head width outside 16..256, or channels that do not lie side by side.
    """
    _check(query, key, value)
    batch, heads, count, dim = query.shape
    out = torch.empty(batch, count, heads, dim, dtype=query.dtype, device=query.device).transpose(1, 2)
    lse = torch.empty(batch, heads, count, dtype=torch.float32, device=query.device)
    if suits_hopper(query, key, value, rows, scoring):
        _hopper(query, key, value, maps, rows, scoring, out, lse)
        return out, lse
    paged = rows.block_table is not None
    capacity = rows.capacity(key)
    size = _sizes("out", query)
    prefill_kernel[triton.cdiv(count, size["QUERIES"]), heads, batch](
        query,
        key,
        value,
        out,
        lse,
        rows.lengths,
        rows.starts,
        rows.block_table,
        maps.key,
        maps.value,
        *_numbers(scoring, dim),
        heads,
        count,
        capacity,
        *query.stride()[:3],
        *out.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        rows.block_table.stride(0) if rows.block_table is not None else 0,
        PAGE=key.shape[2] if paged else 0,
        **size,
        **_constants(scoring, dim),
    )
    return out, lse


def suits_hopper(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scoring: Scoring) -> bool:
    """Whether the kernel for Hopper computes this: dense rows of half precision, without a window."""
    return (
        on_hopper(query.device)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] in HOPPER_DIMS
        and query.shape[2] >= HOPPER_QUERIES
        and rows.block_table is scoring.window is None
        and aligned(query, key, value)
    )


def _hopper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    maps: HeadMaps,
    rows: Rows,
    scoring: Scoring,
    out: Tensor,
    lse: Tensor,
) -> None:
    # Gluon is not in every Triton.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from headfuse.ops.decoupled_attention.hopper_prefill_kernel import GROUPS, QUERIES, hopper_prefill_kernel

    batch, heads, count, dim = query.shape
    element = gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16

    def tiles(tensor: Tensor, lines: int) -> Any:
        shape = [1, 1, lines, dim]
        return TensorDescriptor.from_tensor(tensor, shape, gl.NVMMASharedLayout.get_default_for(shape, element))

    scale, softcap, _ = _numbers(scoring, dim)
    hopper_prefill_kernel[triton.cdiv(count, GROUPS.value * QUERIES.value), heads, batch](
        tiles(query, QUERIES.value),
        tiles(key, HOPPER_BLOCK),
        tiles(value, HOPPER_BLOCK),
        out,
        lse,
        rows.lengths,
        rows.starts,
        maps.key,
        maps.value,
        scale,
        softcap,
        heads,
        count,
        key.shape[2],
        *out.stride()[:3],
        DIM=dim,
        STAGES=HOPPER_STAGES,
        SOFTCAP=scoring.softcap is not None,
        LENGTHS=rows.lengths is not None,
        num_warps=4,
    )


def backward_attention(
    gradient: Float[Tensor, "B H T d"], saved: Saved, maps: HeadMaps, rows: Rows, *, scoring: Scoring = PLAIN
) -> tuple[Float[Tensor, "B H T d"], Float[Tensor, "B K S d"], Float[Tensor, "B V S d"]]:
    """Gradients of queries, keys and values from the output's and `(query, key, value, out, lse)` of the forward pass.

    Sums in fp32, in the same order in every run.
    """
    query, key, value, out, lse = saved
    batch, heads, count, dim = query.shape
    total = key.shape[2]
    # The kernels read both by the same strides.
    gradient = torch.empty_like(out).copy_(gradient) if gradient.stride() != out.stride() else gradient
    delta = torch.empty_like(lse)
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    strides = [*query.stride()[:3], *out.stride()[:3], *key.stride()[:3], *value.stride()[:3]]
    numbers = (*_numbers(scoring, dim), scoring.scale_for(dim), heads, count, total)
    constants = _constants(scoring, dim)
    size = _sizes("query", query)
    query_gradient_kernel[triton.cdiv(count, size["QUERIES"]), heads, batch](
        query,
        key,
        value,
        out,
        gradient,
        lse,
        delta,
        gradients[0],
        rows.lengths,
        rows.starts,
        maps.key,
        maps.value,
        *numbers,
        *strides,
        **size,
        **constants,
    )
    size = _sizes("shared", query)
    for of_keys, target, groups, head_map in (
        (True, gradients[1], maps.key_groups, maps.value),
        (False, gradients[2], maps.value_groups, maps.key),
    ):
        shared_gradient_kernel[triton.cdiv(total, size["BLOCK"]), len(groups), batch](
            query,
            key,
            value,
            gradient,
            lse,
            delta,
            target,
            rows.lengths,
            rows.starts,
            groups,
            head_map,
            *numbers,
            *strides,
            OF_KEYS=of_keys,
            SLOTS=groups.shape[1],
            **size,
            **constants,
        )
    return gradients[0], gradients[1], gradients[2]


def _numbers(scoring: Scoring, dim: int) -> tuple[float, float, int]:
    return scoring.scale_for(dim) * LOG2E, (scoring.softcap or 0.0) * LOG2E, scoring.window or 0


def _constants(scoring: Scoring, dim: int) -> dict[str, Any]:
    return {
        "DIM": dim,
        "PADDED_DIM": triton.next_power_of_2(dim),
        "SOFTCAP": scoring.softcap is not None,
        "WINDOW": scoring.window is not None,
        "PRECISION": "ieee",
    }


def _sizes(role: str, query: Tensor) -> dict[str, int]:
    """Tiles and launch options: what compiles for Hopper without spilling registers, no more queries than there are."""
    fp32, wide = query.dtype == torch.float32, query.shape[-1] > 128
    queries, block, stages, warps = FP32_SIZES if fp32 else SIZES[role][int(wide)]
    if tile(query.shape[2]) < queries:
        queries, warps = tile(query.shape[2]), 4
    return {"QUERIES": queries, "BLOCK": block, "STAGES": stages, "num_warps": warps}


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.shape[-1] not in HEAD_DIMS or any(x.stride(-1) != 1 for x in (query, key, value)):
        raise ConfigError(
            f"prefill kernel: wanted heads of {HEAD_DIMS[0]}..{HEAD_DIMS[-1]} channels side by side, got "
            f"{query.shape[-1]} with strides {[x.stride(-1) for x in (query, key, value)]}; use the sdpa backend"
        )
