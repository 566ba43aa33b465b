"""Is a folder a sound checkpoint that headfuse can convert? Asked once, before any work.

From cheap to dear: the configuration, the headers of the weight files, the attention tensors against the
configuration, all tensors against the model class, and last every number.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headfuse.checkpoints.adapter import Adapter
from headfuse.checkpoints.assembly import attention_tensors
from headfuse.checkpoints.headers import Headers, is_buffer, read_headers, stream_tensors
from headfuse.checkpoints.loading import check_weights_fill_model, load_config
from headfuse.checkpoints.registry import adapter_for
from headfuse.errors import CheckpointError


def check_checkpoint(folder: Path, *, allow_pickle: bool = False) -> None:
    """Return if headfuse can convert the folder; else raise an error of one line: wanted, got, what to do.

    Raises CheckpointError for a folder that is no checkpoint, is incomplete, corrupt, not finite or contradicts
    itself, or is a pickle (unless `allow_pickle`; then only tensors are unpickled, never code), and
    UnsupportedArchitectureError for a sound one that no adapter covers. Weights are read one at a time.
    """
    config = load_config(folder)
    adapter = adapter_for(config)
    check_layers(folder, read_headers(folder, allow_pickle=allow_pickle), adapter, config)
    check_weights(folder, allow_pickle=allow_pickle)


def check_layers(folder: Path, headers: Headers, adapter: Adapter, config: Any) -> None:
    """Raise CheckpointError unless the stored tensors have the layers, and those the heads, of the configuration."""
    stored = meta_tensors(headers, adapter)
    for layer in range(config.num_hidden_layers):
        _check_attention(folder, stored, adapter, config, layer)
    if attention_tensors(stored, adapter, config.num_hidden_layers):
        raise CheckpointError(
            f"{folder}: the configuration promises {config.num_hidden_layers} layers, the weights have more; fix "
            "config.json or the weights"
        )


def check_weights(folder: Path, *, allow_pickle: bool = False) -> None:
    """Return if the folder holds a whole, finite causal language model of any family; else raise CheckpointError."""
    headers = read_headers(folder, allow_pickle=allow_pickle)
    check_weights_fill_model(folder, allow_pickle=allow_pickle)
    for name, tensor in stream_tensors(headers):
        if not tensor.is_floating_point() or not tensor.numel() or is_buffer(name):
            continue
        # The extremes carry NaN and infinity, at a tenth of the price of isfinite; 8-bit floats have neither function.
        extremes = torch.stack(torch.aminmax(tensor.float() if tensor.element_size() == 1 else tensor))
        if not extremes.isfinite().all():
            found = "NaN" if extremes.isnan().any() else "infinite values"
            raise CheckpointError(f"{folder}: wanted finite weights, got {found} in {name}; use an undamaged copy")


def meta_tensors(headers: Headers, adapter: Adapter) -> dict[str, Tensor]:
    """Every stored tensor on the meta device (shape and type, no numbers), under the model's own names.

    Checkpoints of a bare backbone (gpt2, opt-125m) lack the first part of the names, `transformer.` or `model.`.
    """
    root = adapter.attention.partition(".")[0] + "."
    prefix = "" if any(name.startswith(root) for name in headers) else root
    return {
        prefix + name: torch.empty(header.shape, dtype=header.dtype, device="meta") for name, header in headers.items()
    }


def _check_attention(folder: Path, stored: dict[str, Tensor], adapter: Adapter, config: Any, layer: int) -> None:
    """Raise CheckpointError unless the layer's stored tensors split into the heads that the configuration promises."""
    tensors = attention_tensors(stored, adapter, layer)
    if not tensors:
        raise CheckpointError(
            f"{folder}: the configuration promises {config.num_hidden_layers} layers, layer {layer} has no attention "
            "tensors; the weights are incomplete or config.json is another model's"
        )
    try:
        adapter.split(tensors, config, layer)
    except (CheckpointError, RuntimeError) as error:  # RuntimeError: a view that the stored shape does not allow
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder}: {adapter.attention.format(layer=layer)}: {reason}") from error
