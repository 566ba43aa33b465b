"""Decoder blocks compiled by torch.compile, one by one: the blocks of one shape share one graph.

Only the calls are compiled; they are kept beside the model and take the blocks' place for a while.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from headfuse.errors import ConfigError
from headfuse.ops.hopper import on_hopper

# Every shape of a batch, and whatever differs between blocks, is a variant of the same code.
LIMITS = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024}
BACKEND = "inductor"
# For steps of small kernels: independent ones become one, and each is launched before the last has ended.
SMALL_KERNELS = {"combo_kernels": True, "triton.enable_pdl": True}


def compiled_calls(
    blocks: Sequence[nn.Module], *, whole: bool = False, small: bool = False
) -> list[Callable[..., Any]]:
    """Each block's call for static shapes, compiled when it is first made; `whole` refuses what splits its graph.

    `small` favours steps of small kernels, on Hopper.

    Raises ConfigError on a CPU without a C++ compiler.
    """
    devices = {parameter.device for block in blocks for parameter in block.parameters()}
    on_cpu = any(device.type == "cpu" for device in devices)
    if on_cpu and BACKEND == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ConfigError(
            "compile: wanted a C++ compiler to compile for a CPU, got none; install g++ or do not compile"
        )
    options: dict[str, Any] = {"backend": BACKEND, "dynamic": False, "fullgraph": whole}
    if small and BACKEND == "inductor" and all(on_hopper(device) for device in devices):
        options["options"] = SMALL_KERNELS
    return [torch.compile(block._call_impl, **options) for block in blocks]


@contextmanager
def calling(blocks: Sequence[nn.Module], calls: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Within the context, to call a block is to call what stands for it in `calls`."""
    with ExitStack() as undo:
        undo.enter_context(torch._dynamo.config.patch(LIMITS))
        for block, call in zip(blocks, calls, strict=True):
            undo.callback(setattr, block, "_compiled_call_impl", block._compiled_call_impl)
            block._compiled_call_impl = call
        yield
