"""Whether a device is what the kernels for Hopper are made for."""

from functools import lru_cache
from importlib.util import find_spec

import torch

CAPABILITY = 9


@lru_cache
def on_hopper(device: torch.device) -> bool:
    """Whether the device has Hopper's matrix unit, and an installed Triton its Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != CAPABILITY:
        return False
    return find_spec("triton") is not None and find_spec("triton.experimental.gluon") is not None
