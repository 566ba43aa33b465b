"""What kernels want to know of a device: whether it is what those for Hopper are made for, and its size."""

from functools import lru_cache
from importlib.util import find_spec

import torch

CAPABILITY = 9
# What the interpreter pretends to have.
NO_PROCESSORS = 4


@lru_cache
def on_hopper(device: torch.device) -> bool:
    """Whether the device has Hopper's matrix unit, and an installed Triton its Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != CAPABILITY:
        return False
    return find_spec("triton") is not None and find_spec("triton.experimental.gluon") is not None


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return NO_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
