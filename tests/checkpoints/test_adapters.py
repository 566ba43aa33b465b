"""Every adapter, on tiny models of the family's real class."""

from types import SimpleNamespace

import pytest
import torch

from headfuse.checkpoints.adapter import decoupled_heads, decoupled_tensors
from headfuse.checkpoints.assembly import attention_module, decoder_layers, split_model, stock_config, stock_model_state
from headfuse.checkpoints.registry import ADAPTERS, adapter_for
from headfuse.errors import CheckpointError, PlanError, UnsupportedArchitectureError
from pico import (
    FAMILIES,
    GQA_FAMILIES,
    NO_STOCK_GQA,
    case_name,
    every_case,
    every_family,
    logits_of,
    pico,
    pico_config,
    shared,
    tokens,
)


@every_case
def test_join_of_split_is_bit_equal(family, overrides):
    model = pico(family, **overrides)
    adapter = adapter_for(model.config)
    for layer in range(2):
        tensors = attention_module(model, adapter, layer).state_dict()
        joined = adapter.join(adapter.split(tensors, model.config, layer))
        assert joined.keys() == tensors.keys()
        assert all(torch.equal(joined[name], tensors[name]) for name in tensors)


@every_case
def test_as_many_channels_are_rotated_as_the_model_rotates(family, overrides):
    model = pico(family, **overrides)
    planes = [len(part.inv_freq) for part in model.modules() if hasattr(part, "inv_freq")]
    assert adapter_for(model.config).traits(model.config, 0).rotary_dim == 2 * sum(planes)


@every_case
def test_an_unchanged_state_keeps_the_logits_bit_for_bit(family, overrides):
    model, ids = pico(family, **overrides), tokens(2, 9)
    adapter = adapter_for(model.config)
    heads, before = split_model(model, adapter), logits_of(model, ids)
    copy = type(model)(stock_config(model.config, adapter, heads)).eval()
    copy.load_state_dict(stock_model_state(model.state_dict(), adapter, heads))
    assert torch.equal(logits_of(copy, ids), before)


@pytest.mark.parametrize("family", GQA_FAMILIES)
def test_grouped_heads_are_joined_into_a_stock_model_with_fewer(family):
    model = pico(family)
    adapter = adapter_for(model.config)
    heads = [shared(layer, (0, 0, 1, 1), (0, 0, 1, 1)) for layer in split_model(model, adapter)]
    config = stock_config(model.config, adapter, heads)
    grouped = type(model)(config).eval()
    grouped.load_state_dict(stock_model_state(model.state_dict(), adapter, heads))
    assert (config.num_key_value_heads, model.config.num_key_value_heads) == (2, 4)
    for layer, expected in enumerate(heads):
        again = adapter.split(attention_module(grouped, adapter, layer).state_dict(), config, layer)
        assert again.key_map == expected.key_map
        assert torch.equal(again.k, expected.k)


@every_case
def test_decoupled_tensors_hold_the_heads(family, overrides):
    model = pico(family, **overrides)
    for heads in split_model(model, adapter_for(model.config)):
        again = decoupled_heads(decoupled_tensors(heads), heads)
        for name, value in vars(heads).items():
            other = getattr(again, name)
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


@every_family
def test_the_adapter_finds_the_blocks_and_their_attention(family):
    model = pico(family)
    adapter = adapter_for(model.config)
    layers = decoder_layers(model, adapter)
    assert len(layers) == 2
    for index, layer in enumerate(layers):
        attention = attention_module(model, adapter, index)
        assert any(child is attention for child in layer.children())
        assert attention.layer_idx == index


@every_family
def test_uneven_groups_are_refused_for_a_stock_checkpoint(family):
    model = pico(family)
    adapter = adapter_for(model.config)
    heads = split_model(model, adapter)[0]
    for maps in (((0, 0, 0, 1), (0, 0, 0, 1)), ((0, 0, 1, 1), (0, 1, 1, 0)), ((0, 1, 0, 1), (0, 1, 0, 1))):
        with pytest.raises(PlanError, match="--target dha"):
            adapter.join(shared(heads, *maps))


@pytest.mark.parametrize("family", NO_STOCK_GQA)
def test_even_groups_are_refused_where_the_stock_class_has_none(family):
    model = pico(family)
    adapter = adapter_for(model.config)
    with pytest.raises(PlanError, match=r"one key and value head for each of 4 query heads, got 2 .*--target dha"):
        adapter.join(shared(split_model(model, adapter)[0], (0, 0, 1, 1), (0, 0, 1, 1)))


def test_counts_that_differ_by_layer_are_refused_for_a_stock_checkpoint():
    model = pico("llama")
    first, second = split_model(model, ADAPTERS["llama"])
    with pytest.raises(PlanError, match=r"got \[2, 4\]; use --target dha"):
        stock_config(model.config, ADAPTERS["llama"], [first, shared(second, (0, 0, 1, 1), (0, 0, 1, 1))])


@every_family
def test_weights_that_contradict_the_configuration_are_refused(family):
    model = pico(family)
    adapter = adapter_for(model.config)
    tensors = attention_module(model, adapter, 0).state_dict()
    for name in [name for name in tensors if name.endswith("weight")]:
        with pytest.raises(CheckpointError, match=name):
            adapter.split({n: t for n, t in tensors.items() if n != name}, model.config, 0)
        with pytest.raises(CheckpointError, match=f"{name}.*promises"):
            adapter.split(tensors | {name: tensors[name][:-1]}, model.config, 0)


REFUSED_FEATURES = [
    ("mistral", {"sliding_window": 4096}, "got sliding_window=4096; .*without sliding windows"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "full.* and sliding"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "got sliding_attention"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm=true.*layer norms"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=true"),
    ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true.*set it to false"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantized.*dequantize"),
]


@pytest.mark.parametrize(("family", "overrides", "message"), REFUSED_FEATURES, ids=case_name)
def test_a_feature_that_breaks_conversion_is_refused_by_name(family, overrides, message):
    with pytest.raises(UnsupportedArchitectureError, match=f"^{family}: wanted .*{message}"):
        adapter_for(pico_config(family, **overrides))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "experts"),
        ("deepseek_v3", "latent"),
        ("gemma3_text", "sliding-window"),
        ("qwen3_next", "recurrent"),
        ("gptj", "adjacent channels"),
        ("bloom", "ALiBi"),
        ("dha_llama", "original checkpoint"),
        ("t5", "add an adapter"),
    ],
)
def test_an_unsupported_family_is_refused_with_the_reason(model_type, reason):
    with pytest.raises(UnsupportedArchitectureError, match=f"llama.*got '{model_type}'.*{reason}") as caught:
        adapter_for(SimpleNamespace(model_type=model_type))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_an_unused_sliding_window_is_accepted(family):
    adapter_for(pico_config(family, use_sliding_window=False, sliding_window=4096))
    adapter_for(pico_config(family, use_sliding_window=True, sliding_window=4096, max_window_layers=2))


def test_every_family_has_an_adapter():
    assert ADAPTERS.keys() == FAMILIES.keys()
    assert all(adapter.family == family for family, adapter in ADAPTERS.items())
