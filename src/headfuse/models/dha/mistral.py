"""Mistral with decoupled heads."""

from transformers import MistralConfig, MistralForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaMistralConfig(DecoupledMaps, MistralConfig):
    """`MistralConfig` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_mistral"


class DhaMistralForCausalLM(DecoupledGeneration, MistralForCausalLM):
    """`MistralForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaMistralConfig

    def __init__(self, config: DhaMistralConfig) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: MistralConfig, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(config, layer_idx)
