"""Phi 1, 1.5 and 2 with decoupled heads: biases everywhere, partial rotary."""

from transformers import PhiConfig, PhiForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape, partial_rotary


class DhaPhiConfig(DecoupledMaps, PhiConfig):
    """`PhiConfig` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_phi"


class DhaPhiForCausalLM(DecoupledGeneration, PhiForCausalLM):
    """`PhiForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaPhiConfig

    def __init__(self, config: DhaPhiConfig) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: PhiConfig, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    return family_shape(config, layer_idx, rotary_dim=partial_rotary(config), input_bias=True, output_bias=True)
