"""LLaMA with decoupled heads."""

from transformers import LlamaConfig, LlamaForCausalLM

from .decoupled_attention import AttentionShape
from .decoupling import DecoupledGeneration, decouple, per_layer_maps


class DhaLlamaConfig(LlamaConfig):
    """`LlamaConfig` plus, for each layer, the key head and the value head that each query head reads."""

    model_type = "dha_llama"
    base_model_tp_plan = None  # a column split of k and v would break the maps
    key_map: list[list[int]] | None = None
    value_map: list[list[int]] | None = None

    def __post_init__(self, **kwargs):
        """Fill and check the maps."""
        super().__post_init__(**kwargs)
        per_layer_maps(self)


class DhaLlamaForCausalLM(DecoupledGeneration, LlamaForCausalLM):
    """`LlamaForCausalLM` whose layers read per-layer numbers of key and value heads."""

    config_class = DhaLlamaConfig

    def __init__(self, config: DhaLlamaConfig) -> None:
        super().__init__(config)
        decouple(self.model.layers, "self_attn", config, attention_shape)
        self.post_init()


def attention_shape(config: DhaLlamaConfig, layer_idx: int) -> AttentionShape:
    """What layer `layer_idx` of this family does around its heads."""
    return AttentionShape(
        hidden_size=config.hidden_size,
        head_dim=config.head_dim,
        key_map=tuple(config.key_map[layer_idx]),
        value_map=tuple(config.value_map[layer_idx]),
        scaling=config.head_dim**-0.5,
        rotary_dim=config.head_dim,
        input_bias=config.attention_bias,
        output_bias=config.attention_bias,
        dropout=config.attention_dropout,
    )
