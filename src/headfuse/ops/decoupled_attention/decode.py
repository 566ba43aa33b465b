"""One new token a row against a cache of decoupled heads: the launchers of the decoding kernels.

Every stride of the cache but the last is free, so the folded cache of `models/dha` (token by token, all heads of a
token together) and head-by-head caches are both read in place. Lengths stay on the device and the grid depends on
shapes alone, so a captured graph serves rows that grow.
"""

# Triton adds launch options to a kernel's own arguments.
# pyright: reportCallIssue=false

from dataclasses import dataclass
from math import log2
from typing import Any, Literal

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from headfuse.errors import ConfigError
from headfuse.ops.decoupled_attention.combine_kernel import combine_kernel
from headfuse.ops.decoupled_attention.head_maps import HeadMaps
from headfuse.ops.decoupled_attention.passes_kernel import scores_kernel, values_kernel
from headfuse.ops.decoupled_attention.rows import ALL_TOKENS, Rows
from headfuse.ops.decoupled_attention.scoring import PLAIN, Scoring
from headfuse.ops.hopper import on_hopper, processors

Design = Literal["hopper", "passes"]

LOG2E = log2(torch.e)
MAX_QUERY_HEADS = 128
HEAD_DIMS = range(16, 257)
# Bytes of a Hopper multiprocessor, and what each of its programs takes for itself.
SHARED_MEMORY, RESERVED_MEMORY = 228 * 1024, 1024
MOST_STAGES = 10
# Channels of a program that joins many splits.
SHORT_STRETCH = 32
# Another wave has to fill the multiprocessors by so much more.
MOST_WAVES, WORTHWHILE = 4, 0.08


@dataclass(frozen=True)
class DecodeConfig:
    """How to run one decoding step; `programs` is the wanted number of programs for each multiprocessor.

    "hopper" reads each head once in one kernel, on Hopper alone; "passes" takes two, anywhere.
    """

    design: Design = "passes"
    block: int = 128
    warps: int = 4
    stages: int = 3
    programs: int = 2


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

    Raises ConfigError for more than 128 query heads, a head width outside 16..256, or heads that are not contiguous.
    """
    _check(query, key, value, maps)
    config = config or default_config(query, key, value, rows)
    step = _Step(query, key, value, maps, rows, scoring)
    if config.design == "hopper":
        _hopper(step, config)
    else:
        _passes(step, config)
    return step.out, step.lse


def default_config(
    query: Float[Tensor, "B H d"],
    key: Float[Tensor, "P K N d"],
    value: Float[Tensor, "P V N d"],
    rows: Rows = ALL_TOKENS,
) -> DecodeConfig:
    """For Hopper one kernel; elsewhere, in fp32, or where 16 bytes of a token cannot be copied at once, two passes."""
    width, single = triton.next_power_of_2(query.shape[-1]), query.dtype == torch.float32
    if on_hopper(query.device) and not single and aligned(key, value):
        tokens = query.shape[0] * rows.capacity(key)
        return hopper_config(query.shape[1], width, tokens / processors(query.device))
    return DecodeConfig(block=32 if single else 128 if width <= 128 else 64)


def hopper_config(heads: int, width: int, tokens: float) -> DecodeConfig:
    """The configuration for that many tokens of all rows on each multiprocessor, with all the stages that fit.

    Memory is read fastest in large tiles of few programs; where there are few tokens, more programs share them.
    """
    warps = 4 if heads <= 64 else 8
    block, programs = (128, 1) if tokens >= 96 else (64, 2) if tokens >= 40 else (32, 3)
    if width > 128:
        block = min(block, 64)
    if width > 128 or warps == 8:
        programs = 1
    room = SHARED_MEMORY // programs - RESERVED_MEMORY - 16 * warps * width * 2
    return DecodeConfig("hopper", block, warps, min(MOST_STAGES, room // (block * width * 2)), programs)


def split_count(programs: int, capacity: int, block: int, room: int) -> int:
    """Into how many stretches of whole blocks to cut the tokens of each program, so that waves of `room` are full.

    The fewest, unless one of the next waves fills the room by a good deal more.
    """
    most, fullest, chosen = max(1, triton.cdiv(capacity, block)), 0.0, 1
    for waves in range(1, MOST_WAVES + 1):
        splits = min(most, max(1, waves * room // programs))
        filled = splits * programs / (triton.cdiv(splits * programs, max(1, room)) * max(1, room))
        if filled > fullest + WORTHWHILE:
            fullest, chosen = filled, splits
    return chosen


class _Step:
    """The tensors of one decoding step and what all its kernels are told about them."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, maps: HeadMaps, rows: Rows, scoring: Scoring) -> None:
        self.query, self.key, self.value, self.maps = query, key, value, maps
        self.starts, self.block_table = rows.starts, rows.block_table
        self.rows, self.heads, self.dim = query.shape
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.lse = torch.empty(self.rows, self.heads, dtype=torch.float32, device=query.device)
        self.capacity = rows.capacity(key)
        self.lengths = rows.lengths
        if self.lengths is None:
            self.lengths = torch.full((self.rows,), self.capacity, dtype=torch.int32, device=query.device)
        self.scale = scoring.scale_for(self.dim) * LOG2E
        self.softcap = (scoring.softcap or 0.0) * LOG2E
        self.window = scoring.window or 0
        self.constants: dict[str, Any] = {
            "DIM": self.dim,
            "PADDED_DIM": triton.next_power_of_2(self.dim),
            "PAGE": 0 if self.block_table is None else key.shape[2],
        }
        self.table_row_stride = 0 if self.block_table is None else self.block_table.stride(0)

    def splits(self, parts: int, config: DecodeConfig) -> int:
        """Into how many stretches to cut each row, `parts` programs running for each."""
        room = config.programs * processors(self.query.device)
        return split_count(self.rows * parts, self.capacity, config.block, room)

    def partial(self, splits: int) -> tuple[Tensor, Tensor]:
        """Room for the outputs and log-sum-exps of every split."""
        shape = (self.rows, self.heads, splits)
        device = self.query.device
        lse = torch.empty(shape, dtype=torch.float32, device=device)
        return torch.empty((*shape, self.dim), dtype=torch.float32, device=device), lse


def _hopper(step: _Step, config: DecodeConfig) -> None:
    from headfuse.ops.decoupled_attention.hopper_kernel import hopper_kernel  # Gluon is not in every Triton

    splits = step.splits(1, config)
    partial_out, partial_lse = step.partial(splits) if splits > 1 else (step.lse, step.lse)
    hopper_kernel[splits, step.rows](
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
        step.capacity,
        *step.query.stride()[:2],
        *step.out.stride()[:2],
        *step.key.stride()[:3],
        *step.value.stride()[:3],
        step.table_row_stride,
        QUERIES=16 * config.warps,
        BLOCK=config.block,
        STAGES=config.stages,
        SOFTCAP=step.softcap > 0,
        DEPENDENT=splits > 1,
        num_warps=config.warps,
        launch_pdl=True,
        **step.constants,
    )
    if splits > 1:
        _combine(step, partial_out, partial_lse, splits, weighted=True, dependent=True)


def _passes(step: _Step, config: DecodeConfig) -> None:
    maps = step.maps
    splits = step.splits(max(maps.num_key_heads, maps.num_value_heads), config)
    partial_out, partial_lse = step.partial(splits)
    scores = torch.empty(step.rows, step.heads, step.capacity, dtype=torch.float32, device=step.query.device)
    common = {"BLOCK": config.block, "STAGES": config.stages, "num_warps": config.warps, "PRECISION": "ieee"}
    common |= step.constants
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
        SPLITS=min(join_tile(splits), 64),
        **common,
    )
    _combine(step, partial_out, partial_lse, splits, weighted=False, dependent=False)


def _combine(
    step: _Step, partial_out: Tensor, partial_lse: Tensor, splits: int, *, weighted: bool, dependent: bool
) -> None:
    width = step.constants["PADDED_DIM"]
    channels = min(width, SHORT_STRETCH) if splits > 16 else width  # few rows with many splits: more programs
    combine_kernel[step.heads, step.rows, width // channels](
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
        CHANNELS=channels,
        DEPENDENT=dependent,
        num_warps=4 if splits > 16 else 1,
        **({"launch_pdl": True} if dependent else {}),
    )


def join_tile(splits: int) -> int:
    """How many splits to read at once: one of four sizes, so that few kernels are compiled."""
    return 4 if splits <= 4 else 16 if splits <= 16 else 64 if splits <= 64 else 256


def aligned(*caches: Tensor) -> bool:
    """Whether every 16 bytes of every token can be copied at once."""
    return all(x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3]) for x in caches)


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
