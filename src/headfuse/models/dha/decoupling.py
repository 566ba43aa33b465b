"""What turns a stock family class into one with decoupled heads: maps in the config, attention in the layers."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .decoupled_attention import AttentionShape, DecoupledAttention


def per_layer_maps(config: Any) -> None:
    """Default absent maps to the family's own head sharing, then check both.

    Raises ValueError unless each layer names, for every query head, one of the heads 0..n-1, all of them used.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    shared = getattr(config, "num_key_value_heads", None) or heads
    for name in ("key_map", "value_map"):
        if getattr(config, name) is None:
            setattr(config, name, [[h * shared // heads for h in range(heads)] for _ in range(layers)])
        maps = getattr(config, name)
        if len(maps) != layers:
            raise ValueError(f"{name} must have one entry for each of {layers} layers, got {len(maps)}")
        for layer, head_map in enumerate(maps):
            if len(head_map) != heads or set(head_map) != set(range(max(head_map) + 1)):
                raise ValueError(
                    f"{name}[{layer}] must name one of the heads 0..n-1 for each of {heads} query heads, "
                    f"every head at least once; got {head_map}"
                )


def decouple(
    layers: Iterable[nn.Module],
    attribute: str,
    config: Any,
    attention_shape: Callable[[Any, int], AttentionShape],
) -> None:
    """Put a `DecoupledAttention` in the place of every layer's own attention module."""
    for index, layer in enumerate(layers):
        setattr(layer, attribute, DecoupledAttention(config, index, attention_shape(config, index)))


class DecoupledGeneration:
    """Generation settings that hold for every family with decoupled heads."""

    def _get_static_cache_init_shape(self) -> None:
        """Let the static cache take its widths from the first folded keys and values, not from the config."""
        return
