"""GPT-2 with decoupled heads: nothing is rotated; the fused Conv1D projection becomes three linear ones."""

from transformers import GPT2Config, GPT2LMHeadModel

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, DecoupledMaps, decouple, family_shape


class DhaGPT2Config(DecoupledMaps, GPT2Config):
    """`GPT2Config` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_gpt2"


class DhaGPT2ForCausalLM(DecoupledGeneration, GPT2LMHeadModel):
    """`GPT2LMHeadModel` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaGPT2Config

    def __init__(self, config: DhaGPT2Config) -> None:
        super().__init__(config)
        decouple(self.transformer.h, "attn", config, attention_shape)
        self.post_init()


def attention_shape(config: GPT2Config, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family, stock or decoupled, does around its heads."""
    scaling = (config.hidden_size // config.num_attention_heads) ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scaling /= layer_idx + 1
    return family_shape(
        config,
        layer_idx,
        scaling=scaling,
        rotary_dim=0,
        input_bias=True,
        output_bias=True,
        dropout=config.attn_pdrop,
        output_dropout=config.resid_pdrop,
    )
