"""Qwen3 with decoupled heads: queries and keys are normalised head by head."""

from transformers import Qwen3Config, Qwen3ForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaQwen3Config(DecoupledMaps, Qwen3Config):
    """`Qwen3Config` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_qwen3"


class DhaQwen3ForCausalLM(DecoupledGeneration, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaQwen3Config

    def __init__(self, config: DhaQwen3Config) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: Qwen3Config, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(
        config,
        layer_idx,
        input_bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm="head",
        norm_eps=config.rms_norm_eps,
    )
