"""Bytes of key/value cache per token: measured from the cache that a model fills, and computed from its shape."""

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from headfuse.evaluation.inference import device_of, measuring
from headfuse.planning.plan import HeadPlan

SHORT, LONG = 8, 24


def measured_cache_bytes(model: PreTrainedModel) -> int:
    """Bytes that one more token adds to a `DynamicCache`: two lengths are run and their difference divided."""
    with measuring(model):
        short, long = (_filled_bytes(model, length) for length in (SHORT, LONG))
    per_token, rest = divmod(long - short, LONG - SHORT)
    assert rest == 0, "a cache grows by the same number of bytes with every token"
    return per_token


def computed_cache_bytes(shape: HeadPlan | PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes per token that a plan, or the configuration of a stock or decoupled model, promises for `dtype`."""
    if isinstance(shape, HeadPlan):
        return shape.kv_bytes_per_token(dtype.itemsize)
    config = shape.get_text_config(decoder=True)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_map, value_map = getattr(config, "key_map", None), getattr(config, "value_map", None)
    if key_map and value_map:
        cached = sum(max(layer) + 1 for head_map in (key_map, value_map) for layer in head_map)
    else:
        cached = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads)
    return cached * width * dtype.itemsize


def cache_report(model: PreTrainedModel) -> dict[str, Any]:
    """JSON-ready: measured and computed bytes per token in the model's dtype."""
    return {
        "measured_bytes_per_token": measured_cache_bytes(model),
        "computed_bytes_per_token": computed_cache_bytes(model.config, model.dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _filled_bytes(model: PreTrainedModel, length: int) -> int:
    cache = DynamicCache(config=model.config)
    model(
        input_ids=torch.zeros(1, length, dtype=torch.int64, device=device_of(model)),
        past_key_values=cache,
        use_cache=True,
    )
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
