"""How torch computes a training step: as fast as it can, or the same bits in every run.

On Hopper cuDNN's attention is the fastest: on an H100 it computes the backward pass of heads of 128 channels 1.6 times
as fast as Flash, of 64 1.4 times, and of 32 as fast (`benchmarks/results/backward_attention.json`, LOG.md). It adds up
gradients in the order in which they come, so two runs differ in the last bits; so does Flash, but for a slower way that
it takes where torch is told to refuse everything else.
"""

# What torch.utils.deterministic has is made when it is imported.
# pyright: reportAttributeAccessIssue=false

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from headfuse.errors import ConfigError
from headfuse.ops.hopper import on_hopper

# The first that can: cuDNN refuses some masks and widths.
HOPPER_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Those with a backward pass that repeats.
REPEATING_ORDER = HOPPER_ORDER[1:]
# Without it cuBLAS may choose differently from run to run; torch reads it at the first product of a process.
CUBLAS_SETTING = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# What torch says of an operation that it refuses, behind its name; and in what it says of cuBLAS.
REFUSED, OF_CUBLAS = " does not have a deterministic implementation", CUBLAS_SETTING[0]


def prepare_products(*, deterministic: bool) -> None:
    """Have cuBLAS choose alike in every run, if so wanted: to be called before a process's first product on a GPU."""
    if deterministic:
        os.environ.setdefault(*CUBLAS_SETTING)


@contextmanager
def arithmetic(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Within the context torch takes deterministic algorithms alone, or, on Hopper, cuDNN's attention before Flash.

    Raises ConfigError for an operation that has no deterministic algorithm.
    """
    if deterministic:
        with _deterministic():
            yield
    elif on_hopper(device) and not torch.are_deterministic_algorithms_enabled():
        with sdpa_kernel(HOPPER_ORDER, set_priority=True):
            yield
    else:
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    prepare_products(deterministic=True)
    try:
        # Not by warnings: told to warn only, attention takes the algorithms that do not repeat.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # every value is written before it is read
        with sdpa_kernel(REPEATING_ORDER, set_priority=True):
            yield
    except RuntimeError as error:
        said = str(error)
        if REFUSED in said:
            got, then = f"{said.partition(REFUSED)[0]}, which torch has no such way for", "leave --deterministic out"
        elif OF_CUBLAS in said:
            got, then = "products before cuBLAS was told", f"set {'='.join(CUBLAS_SETTING)} in the environment"
        else:
            raise
        raise ConfigError(f"wanted the same bits in every run, got {got}; {then}") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
