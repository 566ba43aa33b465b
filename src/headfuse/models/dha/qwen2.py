"""Qwen2 with decoupled heads: biases on q, k and v alone."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaQwen2Config(DecoupledMaps, Qwen2Config):
    """`Qwen2Config` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_qwen2"


class DhaQwen2ForCausalLM(DecoupledGeneration, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaQwen2Config

    def __init__(self, config: DhaQwen2Config) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: Qwen2Config, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(config, layer_idx, input_bias=True)
