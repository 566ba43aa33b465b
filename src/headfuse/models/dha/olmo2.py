"""OLMo 2 with decoupled heads: one norm over all query heads and one over all key heads."""

from transformers import Olmo2Config, Olmo2ForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaOlmo2Config(DecoupledMaps, Olmo2Config):
    """`Olmo2Config` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_olmo2"


class DhaOlmo2ForCausalLM(DecoupledGeneration, Olmo2ForCausalLM):
    """`Olmo2ForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaOlmo2Config

    def __init__(self, config: DhaOlmo2Config) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: Olmo2Config, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(
        config,
        layer_idx,
        input_bias=config.attention_bias,
        output_bias=config.attention_bias,
        qk_norm="all",
        norm_eps=config.rms_norm_eps,
    )
