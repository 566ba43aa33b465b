"""One new token a row against a cache of decoupled heads: the launchers of the decoding kernels.

Every stride of the cache but the last is free, so the folded cache of `models/dha` (token by token, all heads of a
token together) and head-by-head caches are both read in place. Lengths stay on the device and the grid depends on
shapes alone, so a captured graph serves rows that grow.
"""

# Triton adds launch options to a kernel's own arguments.
# pyright: reportCallIssue=false

from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Any, Literal

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention.combine_kernel import combine_kernel
from headfuse.ops.decoupled_attention.fused_kernel import fused_kernel
from headfuse.ops.decoupled_attention.head_maps import HeadMaps, tile
from headfuse.ops.decoupled_attention.passes_kernel import scores_kernel, values_kernel
from headfuse.ops.decoupled_attention.rows import ALL_TOKENS, Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring

Design = Literal["fused", "passes"]

LOG2E = log2(torch.e)
MAX_QUERY_HEADS = 128
HEAD_DIMS = range(16, 257)
# Measured right on Hopper with Triton 3.6: two groups of four warps, each with its own half of the channels. With one
# group, or two that share the channels, the product of values and weights was wrong.
FUSED_WARPS = 8
FUSED_WIDTH = 128
# The tile of query heads whose outputs fit the registers.
FUSED_HEADS = 32
# What the interpreter pretends to have.
NO_PROCESSORS = 4


@dataclass(frozen=True)
class DecodeConfig:
    """How to run one decoding step; `programs` is the wanted number of programs for each multiprocessor."""

    design: Design = "fused"
    block: int = 128
    warps: int = 8
    stages: int = 4
    programs: int = 1

    def __post_init__(self) -> None:
        if self.design == "fused" and self.warps != FUSED_WARPS:
            raise ConfigError(
                f"fused decoding: wanted {FUSED_WARPS} warps, got {self.warps}, with which Triton 3.6 returns wrong "
                "values on Hopper; leave the warps out"
            )


def decode_attention(
    query: Float[Tensor, "B H d"],
    key: Float[Tensor, "P K N d"],
    value: Float[Tensor, "P V N d"],
    maps: HeadMaps,
    rows: Rows = ALL_TOKENS,
    *,
    scoring: Scoring = PLAIN,
    config: DecodeConfig | None = None,
) -> tuple[Float[Tensor, "B H d"], Float[Tensor, "B H"]]:
    """Attention of one query a row, at position `lengths[b] - 1`, and its log-sum-exp.

    Without a block table the cache is dense and P is B. A row of no tokens gives zeros and -inf.

    Raises ConfigError for more than 128 query heads, a head width outside 16..256, heads that are not contiguous, or a
    configuration known to be wrong.
    """
    _check(query, key, value, maps)
    config = config or default_config(query)
    if config.design == "fused" and query.is_cuda and triton.next_power_of_2(query.shape[-1]) < FUSED_WIDTH:
        raise ConfigError(
            f"fused decoding: wanted heads of more than {FUSED_WIDTH // 2} channels, got {query.shape[-1]}, for which "
            "Triton 3.6 returns wrong values on Hopper; use two passes"
        )
    step = _Step(query, key, value, maps, rows, scoring)
    if config.design == "fused":
        _fused(step, config)
    else:
        _passes(step, config)
    return step.out, step.lse


def default_config(query: Float[Tensor, "B H d"]) -> DecodeConfig:
    """One pass where the outputs of all heads fit the registers, else two.

    Of all that `benchmarks/decode_attention.py tune` tried, the fused configuration was at most 4% behind the best of
    each shape of up to 32 query heads, and two passes with 128 tokens a block were the best of each shape of more.
    """
    width, narrow = triton.next_power_of_2(query.shape[-1]), query.dtype == torch.float32
    block = 32 if narrow else 128 if width <= 128 else 64
    if width >= FUSED_WIDTH and tile(query.shape[1]) <= FUSED_HEADS and not narrow:
        return DecodeConfig(block=block)
    return DecodeConfig("passes", block, warps=4, stages=3, programs=2)


class _Step:
    """The tensors of one decoding step and what all its kernels are told about them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> None:
        self.query, self.key, self.value, self.maps = query, key, value, maps
        self.starts, self.block_table = rows.starts, rows.block_table
        self.rows, self.heads, self.dim = query.shape
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.lse = torch.empty(self.rows, self.heads, dtype=torch.float32, device=query.device)
        self.capacity = key.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])
        self.lengths = rows.lengths
        if self.lengths is None:
            self.lengths = torch.full((self.rows,), self.capacity, dtype=torch.int32, device=query.device)
        self.scale = scoring.scale_for(self.dim) * LOG2E
        self.softcap = (scoring.softcap or 0.0) * LOG2E
        self.window = scoring.window or 0
        self.constants: dict[str, Any] = {
            "DIM": self.dim,
            "PADDED_DIM": triton.next_power_of_2(self.dim),
            "PRECISION": "ieee",
            "PAGE": 0 if self.block_table is None else key.shape[2],
        }
        self.table_row_stride = 0 if self.block_table is None else self.block_table.stride(0)

    def splits(self, parts: int, config: DecodeConfig) -> int:
        """Into how many stretches to cut each row, `parts` programs running for each: whole waves if possible."""
        room = config.programs * processors(self.query.device)
        most = max(1, triton.cdiv(self.capacity, config.block))
        return min(most, max(1, room // (self.rows * parts)))

    def partial(self, splits: int) -> tuple[Tensor, Tensor]:
        """Room for the outputs and log-sum-exps of every split."""
        shape = (self.rows, self.heads, splits)
        device = self.query.device
        lse = torch.empty(shape, dtype=torch.float32, device=device)
        return torch.empty((*shape, self.dim), dtype=torch.float32, device=device), lse


def _fused(step: _Step, config: DecodeConfig) -> None:
    splits = step.splits(1, config)
    partial_out, partial_lse = step.partial(splits) if splits > 1 else (step.lse, step.lse)
    dependent = splits > 1 and step.query.is_cuda
    fused_kernel[splits, step.rows](
        step.query,
        step.key,
        step.value,
        step.out,
        step.lse,
        partial_out,
        partial_lse,
        step.lengths,
        step.starts,
        step.block_table,
        step.maps.key,
        step.maps.value,
        step.scale,
        step.softcap,
        step.window,
        step.heads,
        step.maps.num_key_heads,
        step.maps.num_value_heads,
        splits,
        *step.query.stride()[:2],
        *step.out.stride()[:2],
        *step.key.stride()[:3],
        *step.value.stride()[:3],
        step.table_row_stride,
        QUERIES=tile(step.heads),
        BLOCK=config.block,
        STAGES=config.stages,
        SOFTCAP=step.softcap > 0,
        DEPENDENT=dependent,
        num_warps=config.warps,
        **step.constants,
    )
    if splits > 1:
        _combine(step, partial_out, partial_lse, splits, weighted=True, dependent=dependent)


def _passes(step: _Step, config: DecodeConfig) -> None:
    maps = step.maps
    splits = step.splits(max(maps.num_key_heads, maps.num_value_heads), config)
    partial_out, partial_lse = step.partial(splits)
    scores = torch.empty(step.rows, step.heads, step.capacity, dtype=torch.float32, device=step.query.device)
    common = {"BLOCK": config.block, "STAGES": config.stages, "num_warps": config.warps, **step.constants}
    scores_kernel[splits, maps.num_key_heads, step.rows](
        step.query,
        step.key,
        scores,
        partial_lse,
        step.lengths,
        step.starts,
        step.block_table,
        maps.key_groups,
        step.scale,
        step.softcap,
        step.window,
        step.heads,
        splits,
        *step.query.stride()[:2],
        *step.key.stride()[:3],
        step.table_row_stride,
        scores.stride(1),
        QUERIES=maps.key_groups.shape[1],
        SOFTCAP=step.softcap > 0,
        **common,
    )
    values_kernel[splits, maps.num_value_heads, step.rows](
        step.value,
        scores,
        step.lse,
        partial_out,
        partial_lse,
        step.lengths,
        step.starts,
        step.block_table,
        maps.value_groups,
        step.window,
        step.heads,
        splits,
        *step.value.stride()[:3],
        step.table_row_stride,
        scores.stride(1),
        QUERIES=maps.value_groups.shape[1],
        SPLITS=join_tile(splits),
        **common,
    )
    _combine(step, partial_out, partial_lse, splits, weighted=False, dependent=False)


def _combine(
    step: _Step, partial_out: Tensor, partial_lse: Tensor, splits: int, *, weighted: bool, dependent: bool
) -> None:
    combine_kernel[step.heads, step.rows](
        partial_out,
        partial_lse,
        step.out,
        step.lse,
        step.heads,
        splits,
        *step.out.stride()[:2],
        WEIGHTED=weighted,
        SPLITS=join_tile(splits),
        DIM=step.dim,
        PADDED_DIM=step.constants["PADDED_DIM"],
        DEPENDENT=dependent,
        num_warps=4 if splits > 16 else 1,
        **({"launch_pdl": True} if dependent else {}),
    )


def join_tile(splits: int) -> int:
    """How many splits to read at once: one of three sizes, so that few kernels are compiled."""
    return 4 if splits <= 4 else 16 if splits <= 16 else 64


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return NO_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _check(query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps) -> None:
    wanted = (maps.num_query_heads, maps.num_key_heads, maps.num_value_heads)
    if wanted != (query.shape[1], key.shape[1], value.shape[1]):
        raise ConfigError(
            f"heads: the maps want {wanted} query, key and value heads, got {query.shape[1]}, {key.shape[1]} and "
            f"{value.shape[1]}; pass the layer's own maps"
        )
    if wanted[0] > MAX_QUERY_HEADS or query.shape[-1] not in HEAD_DIMS:
        raise ConfigError(
            f"decode kernel: wanted at most {MAX_QUERY_HEADS} query heads of width {HEAD_DIMS[0]}..{HEAD_DIMS[-1]}, "
            f"got {wanted[0]} of {query.shape[-1]}; use the sdpa backend"
        )
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        raise ConfigError("decode kernel: wanted the channels of a head side by side, got a stride; call contiguous()")
