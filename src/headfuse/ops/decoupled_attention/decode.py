"""One new token a row against a cache of decoupled heads: the launchers of the decoding kernels.

The cache is paged: `key` `[P, K, N, d]` is P pages of N tokens, and line b of the block table names row b's pages in
order. A dense cache `[B, K, S, d]` is one page a row. Every stride but the last is free, so the folded cache of
`models/dha` (token by token, all heads of a token together) and head-by-head caches are both read in place. Lengths
stay on the device and the grid depends on shapes alone, so a captured graph serves rows that grow.
"""

# Triton adds launch options to a kernel's own arguments.
# pyright: reportCallIssue=false

from dataclasses import dataclass
from functools import lru_cache
from math import log2
from typing import Any, Literal

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention.combine_kernel import combine_kernel
from headfuse.ops.decoupled_attention.fused_kernel import fused_kernel
from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.passes_kernel import scores_kernel, values_kernel
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring

Design = Literal["fused", "passes"]
Joining = Literal["kernel", "dependent", "last"]

LOG2E = log2(torch.e)
MAX_QUERY_HEADS = 128
HEAD_DIMS = range(16, 257)
# Programs that may wait at a time for others of their row; they must leave room for those to run.
MAX_WAITING = 48
# What the interpreter pretends to have.
NO_PROCESSORS = 4


@dataclass(frozen=True)
class DecodeConfig:
    """How to run one decoding step.

    `programs` is the wanted number of programs for each multiprocessor. `joining` says who combines the splits: a
    second kernel, a second kernel whose launch overlaps the first ("dependent"), or the last programs of the first.
    """

    design: Design = "fused"
    block: int = 64
    warps: int = 4
    stages: int = 4
    programs: int = 2
    joining: Joining = "kernel"


@dataclass(frozen=True)
class Rows:
    """Which tokens each row has: `starts[b] <= s < lengths[b]`, found through the block table if the cache is paged.

    All are int32 on the device and are never read by the host.
    """

    lengths: Int[Tensor, "B"]
    starts: Int[Tensor, "B"] | None = None
    block_table: Int[Tensor, "B pages"] | None = None


def decode_attention(
    query: Float[Tensor, "B H d"],
    key: Float[Tensor, "P K N d"],
    value: Float[Tensor, "P V N d"],
    maps: HeadMaps,
    rows: Rows,
    *,
    scoring: Scoring = PLAIN,
    config: DecodeConfig | None = None,
) -> tuple[Float[Tensor, "B H d"], Float[Tensor, "B H"]]:
    """Attention of one query a row, at position `lengths[b] - 1`, and its log-sum-exp.

    Without a block table the cache is dense and P is B. A row of no tokens gives zeros and -inf.

    Raises ConfigError for more than 128 query heads, a head width outside 16..256, or heads that are not contiguous.
    """
    _check(query, key, value, maps)
    config = config or default_config(query, maps)
    step = _Step(query, key, value, maps, rows, scoring)
    if config.design == "fused":
        _fused(step, config)
    else:
        _passes(step, config)
    return step.out, step.lse


def default_config(query: Float[Tensor, "B H d"], maps: HeadMaps) -> DecodeConfig:
    """What to run where nothing was measured: one pass while its outputs fit the registers."""
    width = triton.next_power_of_2(query.shape[-1])
    if maps.cell_size * width <= 64 * 128 and query.dtype != torch.float32:
        wide = maps.cell_size * width > 32 * 128
        return DecodeConfig(warps=8 if wide else 4, stages=4, programs=1 if wide else 2)
    return DecodeConfig(design="passes", block=32 if query.dtype == torch.float32 else 64, stages=3)


class _Step:
    """The tensors of one decoding step and what all its kernels are told about them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> None:
        self.query, self.key, self.value, self.maps = query, key, value, maps
        self.lengths, self.starts, self.block_table = rows.lengths, rows.starts, rows.block_table
        self.rows, self.heads, self.dim = query.shape
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.lse = torch.empty(self.rows, self.heads, dtype=torch.float32, device=query.device)
        self.capacity = key.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])
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
    maps, cells = step.maps, len(step.maps.cells)
    splits = step.splits(cells, config)
    partial_out, partial_lse = step.partial(splits) if splits > 1 else (step.lse, step.lse)
    joins = config.joining == "last" and splits > 1
    combiners = combining_programs(splits, step.rows * cells, maps.cell_size) if joins else 1
    dependent = config.joining == "dependent" and splits > 1
    fused_kernel[splits, cells, step.rows](
        step.query,
        step.key,
        step.value,
        step.out,
        step.lse,
        partial_out,
        partial_lse,
        COUNTERS.take(step.query.device, step.rows * cells) if joins else step.lse,
        step.lengths,
        step.starts,
        step.block_table,
        maps.cells,
        step.scale,
        step.softcap,
        step.window,
        step.heads,
        splits,
        combiners,
        *step.query.stride()[:2],
        *step.out.stride()[:2],
        *step.key.stride()[:3],
        *step.value.stride()[:3],
        step.table_row_stride,
        QUERIES=maps.cell_size,
        BLOCK=config.block,
        STAGES=config.stages,
        SOFTCAP=step.softcap > 0,
        JOIN_SPLITS=join_tile(splits) if joins else 0,
        DEPENDENT=dependent,
        num_warps=config.warps,
        **step.constants,
    )
    if splits > 1 and not joins:
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


def combining_programs(splits: int, rows: int, queries: int) -> int:
    """How many of a row's last programs combine it: at most one for each piece of work, and few enough may wait."""
    pieces = triton.cdiv(queries, 64 // join_tile(splits))
    return max(1, min(splits, pieces, 1 + MAX_WAITING // rows))


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return NO_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class Counters:
    """Zeros on the device that kernels count in and leave at zero.

    Launches on one stream follow each other and share; a captured launch has its own, since graphs may run side by
    side.
    """

    SIZE = 1 << 20

    def __init__(self) -> None:
        self.pools: dict[torch.device, Tensor] = {}
        self.taken: dict[torch.device, int] = {}
        self.of_stream: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, device: torch.device, count: int) -> Int[Tensor, "count"]:
        """`count` zeros that no other launch uses at the same time."""
        if device.type != "cuda":
            return torch.zeros(count, dtype=torch.int32, device=device)
        if torch.cuda.is_current_stream_capturing():
            return self._fresh(device, count)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        held = self.of_stream.get(key)
        if held is None or len(held) < count:
            held = self.of_stream[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
            self._pool(device)
        return held[:count]

    def _pool(self, device: torch.device) -> Tensor:
        if device not in self.pools:
            self.pools[device] = torch.zeros(self.SIZE, dtype=torch.int32, device=device)
            self.taken[device] = 0
        return self.pools[device]

    def _fresh(self, device: torch.device, count: int) -> Tensor:
        first = self.taken.get(device, self.SIZE)
        if first + count > self.SIZE:  # never warmed up, or used up: the graph zeroes its own
            return torch.zeros(count, dtype=torch.int32, device=device)
        self.taken[device] = first + count
        return self.pools[device][first : first + count]


COUNTERS = Counters()


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
