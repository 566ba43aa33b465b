"""LLaMA with decoupled heads."""

from transformers import LlamaConfig, LlamaForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaLlamaConfig(DecoupledMaps, LlamaConfig):
    """`LlamaConfig` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_llama"


class DhaLlamaForCausalLM(DecoupledGeneration, LlamaForCausalLM):
    """`LlamaForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaLlamaConfig

    def __init__(self, config: DhaLlamaConfig) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: LlamaConfig, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(config, layer_idx, input_bias=config.attention_bias, output_bias=config.attention_bias)
