"""A checkpoint to generate with: weights in the precision to compute in, the attention made for its heads."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from headfuse.checkpoints.loading import load_model
from headfuse.checkpoints.source import Source
from headfuse.errors import ConfigError
from headfuse.models.attention import NAME
from headfuse.models.dha.decoupled_attention import DecoupledAttention
from headfuse.ops.hopper import on_hopper
from headfuse.placement import Placement
from headfuse.precision import Precision


def resolve_to_serve(placement: Placement) -> tuple[torch.device, Precision]:
    """Where and how precisely to generate: on a CPU in fp32, unless a precision is asked for.

    A CPU's bf16 products are prepared anew for every length of the cache, which grows with each token.
    """
    device, precision = placement.resolve()
    return device, "fp32" if placement.precision is None and device.type == "cpu" else precision


def load_to_serve(
    source: Source | Path, device: torch.device, precision: Precision, attention: str | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, its weights in bf16 or fp32 themselves: no autocast.

    It attends by the function of the given name. By default that is ours on Hopper, and on a CPU for decoupled heads:
    it reads the cache without repeating heads. Elsewhere it is torch's. Raises ConfigError for a name that transformers
    does not have, or whose package is not installed.
    """
    model = load_model(source, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    decoupled = any(isinstance(module, DecoupledAttention) for module in model.modules())
    ours = decoupled if device.type == "cpu" else on_hopper(device)
    wanted = attention or (NAME if ours else "sdpa")
    try:
        model.set_attn_implementation(wanted)
    except (ValueError, ImportError, KeyError) as error:
        raise ConfigError(
            f"wanted an attention that transformers has and this machine runs, got {wanted!r}; use {NAME}, sdpa or "
            "eager"
        ) from error
    return model
