"""Tiny real models of every family, with random weights, biases and norm gains, so that each of them matters."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OlmoConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from headfuse.checkpoints.heads import AttentionHeads

VOCABULARY = 96
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GATED = SHAPE | {"intermediate_size": 48}

# Family: its configuration class and what the tiny model sets.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2Config, SHAPE | {"n_inner": 48}),
    "gpt_neox": (GPTNeoXConfig, GATED),
    "llama": (LlamaConfig, GATED),
    "mistral": (MistralConfig, GATED | {"sliding_window": None}),
    "olmo": (OlmoConfig, GATED | {"clip_qkv": 0.5}),
    "olmo2": (Olmo2Config, GATED),
    "opt": (OPTConfig, SHAPE | {"ffn_dim": 48}),
    "phi": (PhiConfig, GATED),
    "qwen2": (Qwen2Config, GATED),
    "qwen3": (Qwen3Config, GATED | {"head_dim": 16}),
}
NO_STOCK_GQA = ("gpt2", "gpt_neox", "opt")
GQA_FAMILIES = tuple(family for family in FAMILIES if family not in NO_STOCK_GQA)

# Features that change a layout or what happens around the heads.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
    ("gpt_neox", {"hidden_size": 48}),  # a quarter of 12 channels: two planes are rotated
    ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    ("mistral", {"head_dim": 16, "num_key_value_heads": 1}),
    ("olmo", {"clip_qkv": None}),
    ("opt", {"enable_bias": False}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}}),
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
]
CASES = [
    *((family, {}) for family in FAMILIES),
    *((family, {"num_key_value_heads": 2}) for family in GQA_FAMILIES),
    *VARIANTS,
]


def case_name(value: Any) -> str | None:
    """A test's label for a family or for its overrides."""
    if isinstance(value, dict):
        return ",".join(f"{k}={v if not isinstance(v, dict) else '...'}" for k, v in value.items()) or "plain"
    return None


every_case = pytest.mark.parametrize(("family", "overrides"), CASES, ids=case_name)
every_family = pytest.mark.parametrize("family", FAMILIES)


def pico_config(family: str, *, num_key_value_heads: int | None = None, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny model: hidden size 32, 2 layers, 4 query heads; multi-head unless told otherwise."""
    config_class, fields = FAMILIES[family]
    if family in GQA_FAMILIES:
        fields = fields | {"num_key_value_heads": num_key_value_heads or SHAPE["num_attention_heads"]}
    else:
        assert num_key_value_heads is None, f"{family} has no grouped-query attention"
    return config_class(**(fields | overrides))


def pico(family: str, *, num_key_value_heads: int | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny model of the family's own class in evaluation mode; the same for the same arguments."""
    config = pico_config(family, num_key_value_heads=num_key_value_heads, **overrides)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(float(gain) + 0.25 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without padding."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model: PreTrainedModel, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """The logits of every position, without gradients."""
    with torch.no_grad():
        return model(input_ids, **inputs).logits


def shared(heads: AttentionHeads, key_map: tuple[int, ...], value_map: tuple[int, ...]) -> AttentionHeads:
    """The first key and value heads, read through the maps."""
    keys, values = max(key_map) + 1, max(value_map) + 1
    return replace(
        heads,
        k=heads.k[:keys],
        v=heads.v[:values],
        k_bias=None if heads.k_bias is None else heads.k_bias[:keys],
        v_bias=None if heads.v_bias is None else heads.v_bias[:values],
        k_norm=heads.k_norm[:keys] if heads.traits.qk_norm == "all" and heads.k_norm is not None else heads.k_norm,
        key_map=key_map,
        value_map=value_map,
    )
