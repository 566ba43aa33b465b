"""Compiling the kernels that a mode needs, in several processes at once: by running each on a small input.

A small run has the constants, the layout and the alignment of the real ones, so that Triton finds its kernel in its
cache when it comes to those.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from attention.cases import (
    LEARNED_MODES,
    Case,
    checked_cases,
    checked_configs,
    configs,
    default_for,
    key_of,
    learned_cases,
    learned_checks,
    maps_of,
    table_cases,
    tuned,
    tuned_cases,
)
from attention.inputs import Inputs, Learned
from attention.lines import say
from headfuse.ops.decoupled_attention.decode import DecodeConfig
from headfuse.ops.decoupled_attention.head_maps import tile
from headfuse.ops.decoupled_attention.prefill import SIZES, backward_attention, prefill_attention
from headfuse.ops.decoupled_attention.rows import Rows

# Fewer queries than a tile holds compile to a smaller tile.
FULL_TILE = max(queries for sizes in SIZES.values() for queries, *_ in sizes)


def compile_share(options: argparse.Namespace) -> None:
    """Compile every `of`-th kernel that the mode will need."""
    for what, run in list(small_runs(options))[options.share :: options.of]:
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            say(note=f"compiling {what}: {type(error).__name__} {str(error)[:200]}")


def small_runs(options: argparse.Namespace) -> Iterator[tuple[Any, Callable[[], None]]]:
    """What each small run compiles, and the run."""
    if options.mode in LEARNED_MODES:
        for case, gradients in learned_kernels(options.mode):
            what = f"{'gradients' if gradients else 'output'} of {case}"
            yield what, lambda case=case, gradients=gradients: run_learned(case, gradients=gradients)
        return
    for case, config in kernels(options.mode, tuned(options.tuned)):
        yield config, lambda case=case, config=config: run_decode(case, config)


def run_decode(case: Case, config: DecodeConfig | None) -> None:
    """One decoding step."""
    Inputs(case, sets=1).step(0, config)


def run_learned(case: Case, *, gradients: bool) -> None:
    """The prefill kernel, or those of the gradients without a forward pass, on numbers that mean nothing."""
    inputs = Learned(case)
    (query, key, value), maps, rows = inputs.leaves, inputs.maps, Rows(starts=inputs.starts)
    if not gradients:
        prefill_attention(query, key, value, maps, rows, scoring=case.scoring)
        return
    out = inputs.upstream  # which is laid out as an output
    lse = torch.zeros(out.shape[:3], device="cuda")
    backward_attention(out, (query, key, value, out, lse), maps, rows, scoring=case.scoring)


def kernels(mode: str, best: dict[str, DecodeConfig]) -> Iterator[tuple[Case, DecodeConfig | None]]:
    """One small run for each kernel: the same constants and alignment as the real runs, no more of the rest."""
    seen = set()
    cases = [(case, checked_configs(case)) for case in checked_cases()]
    if mode == "tune":
        cases = [(case, [*configs(case)]) for case in tuned_cases()] + cases
    if mode == "table":
        cases = [(case, [best.get(key_of(case), default_for(case))]) for case in table_cases()] + cases
    for case, tried in cases:
        maps = maps_of(case)
        sizes = (tile(case.query_heads), maps.key_groups.shape[1], maps.value_groups.shape[1])
        for config in tried:
            # Combining has four kernels, by the number of splits; a small run has one for each block.
            for pieces in (1, 4, 16, 20, 80):
                key = (config, pieces, sizes, case.head_dim, case.dtype, case.page, case.softcap is None)
                if key not in seen:
                    seen.add(key)
                    tokens = (config.block if config else 128) * pieces
                    yield replace(case, batch=1, context=tokens, ragged=False), config


def learned_kernels(mode: str) -> list[tuple[Case, bool]]:
    """One small run for each prefill kernel (False) and each set of gradient kernels (True) of the mode.

    Every check takes gradients. Head widths are multiples of 16, and so is every stride, whatever the context.
    """
    wanted = [(case, mode == "backward") for case in learned_cases()]
    wanted += [(case, True) for case in learned_checks()]
    found: dict[tuple[Any, ...], tuple[Case, bool]] = {}
    for case, gradients in wanted:
        small = replace(case, batch=1, context=min(case.context, FULL_TILE))
        maps, scoring = maps_of(case), case.scoring
        forward = (case.dtype, case.head_dim, tile(small.context), case.ragged)
        forward += (scoring.softcap is None, scoring.window is None)
        found.setdefault(forward, (small, False))
        if gradients:
            slots = (maps.key_groups.shape[1], maps.value_groups.shape[1])
            found.setdefault((*forward, *slots), (small, True))
    # Gradients take three kernels: dealt out first, so that the processes end together.
    return sorted(found.values(), key=lambda run: not run[1])
