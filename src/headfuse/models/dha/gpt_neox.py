"""GPT-NeoX and Pythia with decoupled heads: partial rotary; the fused projection becomes three."""

from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape, partial_rotary


class DhaGPTNeoXConfig(DecoupledMaps, GPTNeoXConfig):
    """`GPTNeoXConfig` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_gpt_neox"


class DhaGPTNeoXForCausalLM(DecoupledGeneration, GPTNeoXForCausalLM):
    """`GPTNeoXForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaGPTNeoXConfig

    def __init__(self, config: DhaGPTNeoXConfig) -> None:
        super().__init__(config)
        decouple(self.gpt_neox.layers, "attention", config, attention_shape)
        self.post_init()


def attention_shape(config: GPTNeoXConfig, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(
        config,
        layer_idx,
        rotary_dim=partial_rotary(config),
        input_bias=config.attention_bias,
        output_bias=config.attention_bias,
    )
