"""Which of torch's attentions a training step takes.

Torch prefers Flash. On an H100 cuDNN computes the backward pass of heads of 128 channels 1.6 times as fast, of 64 1.4
times, and of 32 as fast (`benchmarks/results/backward_attention.json`, LOG.md).
"""

from contextlib import AbstractContextManager, nullcontext

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


def fastest_attention(device: torch.device) -> AbstractContextManager[object]:
    """Within the context `scaled_dot_product_attention` tries cuDNN first, on Hopper.

    Elsewhere, and where torch is told to be deterministic, which only its Flash attention can be in a backward pass,
    everything stays as torch has it.
    """
    if torch.are_deterministic_algorithms_enabled() or not on_hopper(device):
        return nullcontext()
    return sdpa_kernel(HOPPER_ORDER, set_priority=True)
