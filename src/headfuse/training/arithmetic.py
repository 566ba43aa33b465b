"""How torch computes a training step: as fast as it can, or the same bits in every run.

Torch prefers Flash attention. On an H100 cuDNN computes the backward pass of heads of 128 channels 1.6 times as fast,
of 64 1.4 times, and of 32 as fast (`benchmarks/results/backward_attention.json`, LOG.md). Both add up gradients in the
order in which they come, so two runs differ in the last bits; Flash has a slower way that does not.
"""

# What torch.utils.deterministic has is made when it is imported.
# pyright: reportAttributeAccessIssue=false

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from headfuse.ops.hopper import on_hopper

# The first that can: cuDNN refuses some masks and widths.
HOPPER_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Without it cuBLAS may choose differently from run to run; read when it is first used.
CUBLAS_SETTING = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def arithmetic(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Within the context torch takes deterministic algorithms, or, on Hopper, cuDNN's attention before Flash.

    What has no deterministic algorithm warns. Where torch was told to be deterministic before, it stays so.
    """
    if not deterministic:
        if on_hopper(device) and not torch.are_deterministic_algorithms_enabled():
            with sdpa_kernel(HOPPER_ORDER, set_priority=True):
                yield
        else:
            yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    os.environ.setdefault(*CUBLAS_SETTING)
    try:
        torch.use_deterministic_algorithms(True, warn_only=not before[0] or before[1])
        torch.utils.deterministic.fill_uninitialized_memory = False  # every value is written before it is read
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
