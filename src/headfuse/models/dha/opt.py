"""OPT with decoupled heads: learned positions, so nothing is rotated."""

from transformers import OPTConfig, OPTForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaOPTConfig(DecoupledMaps, OPTConfig):
    """`OPTConfig` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_opt"


class DhaOPTForCausalLM(DecoupledGeneration, OPTForCausalLM):
    """`OPTForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaOPTConfig

    def __init__(self, config: DhaOPTConfig) -> None:
        super().__init__(config)
        decouple(self.model.decoder.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: OPTConfig, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(config, layer_idx, rotary_dim=0, input_bias=config.enable_bias, output_bias=config.enable_bias)
