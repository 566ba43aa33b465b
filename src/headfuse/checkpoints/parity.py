"""Exactness of a conversion: what must give the same logits does, or nothing is written."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.loading import load_model
from headfuse.checkpoints.opened import LoadedModel
from headfuse.errors import CheckpointError

# Logits of the split and of the written model may differ from their references by this, relative to the largest.
PARITY_TOLERANCE = 1e-4
PARITY_TOKENS = 64


@torch.no_grad()
def split_parity(loaded: LoadedModel, tokens: Int64[Tensor, "N T"]) -> float:
    """Largest relative logit difference between a model and the same model computed from its heads, fp32.

    Raises CheckpointError if it is not small: then an adapter misreads this checkpoint, and nothing must be written.
    """
    sample = tokens[:1, :PARITY_TOKENS].to(loaded.model.device)
    wanted = loaded.model(sample, use_cache=False).logits
    with loaded.with_heads(loaded.heads):
        found = loaded.model(sample, use_cache=False).logits
    return _difference("the checkpoint's heads", wanted, found)


@torch.no_grad()
def written_parity(
    folder: Path,
    loaded: LoadedModel,
    heads: Sequence[AttentionHeads],
    tokens: Int64[Tensor, "N T"],
    *,
    dtype: torch.dtype,
) -> float:
    """The same between a model with new heads, rounded as stored (`loaded` too), and `folder` as transformers loads it.

    Rounding changes nothing but the heads unless config.json names another dtype than the weights have.
    """
    device = loaded.model.device
    sample = tokens[:1, :PARITY_TOKENS].to(device)
    rounded = [layer.to(dtype).to(torch.float32) for layer in heads]
    for parameter in loaded.model.parameters():
        parameter.copy_(parameter.to(dtype))
    with loaded.with_heads(rounded):
        wanted = loaded.model(sample, use_cache=False).logits
    found = load_model(folder, device=device)(sample, use_cache=False).logits
    return _difference("the written folder", wanted, found)


def _difference(name: str, wanted: Float[Tensor, "B T V"], found: Float[Tensor, "B T V"]) -> float:
    difference = ((wanted - found).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()
    if not difference <= PARITY_TOLERANCE:
        raise CheckpointError(
            f"{name}: wanted the same logits to {PARITY_TOLERANCE:g}, got a relative difference of {difference:.2g}; "
            "nothing was written: please report this model's configuration"
        )
    return difference
