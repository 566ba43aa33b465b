"""What turns a stock family class into one with decoupled heads: maps in the config, attention in the layers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .decoupled_attention import AttentionShape, DecoupledAttention


@dataclass(kw_only=True)
class DecoupledMaps:
    """Fields of every decoupled configuration: the key and the value head that each query head reads, by layer.

    Goes before the family's own configuration among the bases.
    """

    key_map: list[list[int]] | None = None
    value_map: list[list[int]] | None = None

    # No tensor parallelism: a column split of k and v would break the maps.
    base_model_tp_plan = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Let the family fill its fields, then fill and check the maps."""
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]  the family's, next in line
        per_layer_maps(self)


def per_layer_maps(config: Any) -> None:
    """Default absent maps to the family's own head sharing, then check both.

    Raises ValueError unless each layer names, for every query head, one of the heads 0..n-1, all of them used.
    """
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    for name in ("key_map", "value_map"):
        if getattr(config, name) is None:
            setattr(config, name, [shared_heads(config) for _ in range(layers)])
        maps = getattr(config, name)
        if len(maps) != layers:
            raise ValueError(f"{name} must have one entry for each of {layers} layers, got {len(maps)}")
        for layer, head_map in enumerate(maps):
            if len(head_map) != heads or set(head_map) != set(range(max(head_map) + 1)):
                raise ValueError(
                    f"{name}[{layer}] must name one of the heads 0..n-1 for each of {heads} query heads, "
                    f"every head at least once; got {head_map}"
                )


def shared_heads(config: Any) -> list[int]:
    """The key/value head that each query head of the stock model reads: equal contiguous groups."""
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return [h * shared // heads for h in range(heads)]


def family_shape(config: Any, layer_idx: int, **differences: Any) -> AttentionShape:
    """The attention of most families: full rotary, no biases, no norms; `differences` replace fields of it.

    `config` may be a stock configuration, whose maps are its own head sharing.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    maps = (getattr(config, name, None) for name in ("key_map", "value_map"))
    key_map, value_map = (shared_heads(config) if m is None else m[layer_idx] for m in maps)
    fields = {
        "hidden_size": config.hidden_size,
        "head_dim": head_dim,
        "key_map": tuple(key_map),
        "value_map": tuple(value_map),
        "scaling": head_dim**-0.5,
        "rotary_dim": head_dim,
        "dropout": getattr(config, "attention_dropout", None) or 0.0,
    }
    return AttentionShape(**(fields | differences))


def partial_rotary(config: Any) -> int:
    """The leading channels of a head that a family with partial rotary embedding rotates: whole planes, so even."""
    channels = int(config.hidden_size // config.num_attention_heads * config.rope_parameters["partial_rotary_factor"])
    return channels + channels % 2


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
    """Generation and parallelism settings that hold for every family with decoupled heads."""

    _tp_plan = None

    def _get_static_cache_init_shape(self) -> None:
        """Let the static cache take its widths from the first folded keys and values, not from the config."""
        return
