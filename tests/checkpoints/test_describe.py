"""What `inspect` says, from headers alone."""

import json

import pytest
import torch

from headfuse.checkpoints.assembly import decoupled_config, decoupled_model_state, split_model
from headfuse.checkpoints.describe import describe
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.checkpoints.write import write_checkpoint
from headfuse.errors import CheckpointError, UnsupportedArchitectureError
from pico import NO_STOCK_GQA, every_case, every_family, pico, shared
from weight_folders import edit_config


def described(tmp_path, family, **overrides):
    pico(family, **overrides).save_pretrained(tmp_path)
    return describe(locate(str(tmp_path)))


def note(description, method, target):
    """Whether the method applies, and the note."""
    found = [m for m in description.methods if (m.method, m.target) == (method, target)]
    assert len(found) == 1
    return found[0].applies, found[0].note or ""


@every_case
def test_counts_agree_with_the_loaded_model(family, overrides, tmp_path):
    model = pico(family, **overrides)
    model.save_pretrained(tmp_path)
    description = describe(locate(str(tmp_path)))
    heads = split_model(model, adapter_for(model.config))
    assert description.family == family
    assert description.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert description.key_heads == tuple(layer.num_key_heads for layer in heads)
    assert description.value_heads == tuple(layer.num_value_heads for layer in heads)
    assert description.rope.channels == heads[0].traits.rotary_dim
    assert description.qk_norm == heads[0].traits.qk_norm
    assert ("q" in description.biases) == (heads[0].q_bias is not None)
    assert ("o" in description.biases) == (heads[0].o_bias is not None)
    assert (
        description.kv_bytes_per_token
        == 2 * sum(h.num_key_heads + h.num_value_heads for h in heads) * heads[0].head_dim
    )


@every_family
def test_the_description_is_json(family, tmp_path):
    content = described(tmp_path, family).model_dump(mode="json")
    assert json.loads(json.dumps(content)) == content
    assert content["kv_bytes_per_token"] > 0


def test_the_cache_at_smaller_budgets(tmp_path):
    cache = described(tmp_path, "llama").cache
    assert [size.percent for size in cache] == [100, 50, 25, 12.5]
    assert [size.heads_per_layer for size in cache] == [4, 2, 1, 0.5]
    assert [size.bytes_per_token for size in cache] == [256, 128, 64, None]
    assert [size.gqa_heads for size in cache] == [4, 2, 1, None]


def test_budgets_that_no_stock_checkpoint_has(tmp_path):
    cache = described(tmp_path, "llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=6).cache
    assert [size.heads_per_layer for size in cache] == [6, 3, 1.5, 0.75]
    assert [size.gqa_heads for size in cache] == [6, 3, None, None]
    assert [size.bytes_per_token for size in cache] == [384, 192, 96, None]


@pytest.mark.parametrize("family", NO_STOCK_GQA)
def test_families_without_grouped_query_attention_go_to_dha_only(family, tmp_path):
    description = described(tmp_path, family)
    assert note(description, "closed-form", "dha")[0]
    applies, reason = note(description, "closed-form", "gqa")
    assert not applies
    assert "--target dha" in reason
    assert [size.gqa_heads for size in description.cache] == [4, None, None, None]


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_qk_norm_is_told_of_methods_that_would_align_keys(family, tmp_path):
    description = described(tmp_path, family)
    assert note(description, "mean-pool", "gqa") == (True, "")
    for method in ("procrustes", "closed-form", "align"):
        applies, caveat = note(description, method, "gqa")
        assert applies
        assert "keys are not aligned" in caveat


def test_align_ends_as_a_stock_checkpoint(tmp_path):
    description = described(tmp_path, "llama")
    assert note(description, "align", "gqa") == (True, "")
    assert note(description, "align", "dha") == (False, "it ends as a stock checkpoint; use --target gqa")


def test_clipping_and_norms_after_the_attention_are_told(tmp_path):
    clipped = described(tmp_path / "olmo", "olmo")
    assert clipped.clip == 0.5
    assert "clipped" in note(clipped, "procrustes", "gqa")[1]
    assert "norm follows" in note(described(tmp_path / "olmo2", "olmo2"), "closed-form", "dha")[1]


def test_multi_query_attention_has_nothing_to_share(tmp_path):
    description = described(tmp_path, "llama", num_key_value_heads=1)
    assert all(not method.applies and "nothing to share" in method.note for method in description.methods)


def test_a_sliding_window_is_described_with_the_reason_against_it(tmp_path):
    description = described(tmp_path, "mistral", sliding_window=64)
    assert all(not method.applies and "sliding_window=64" in method.note for method in description.methods)


def test_a_converted_model_is_described(tmp_path):
    model = pico("llama")
    adapter = adapter_for(model.config)
    maps = [((0, 0, 1, 2), (0, 1, 0, 1)), ((0, 0, 0, 0), (0, 1, 2, 3))]
    heads = [shared(layer, *both) for layer, both in zip(split_model(model, adapter), maps, strict=True)]
    state, config = (
        decoupled_model_state(model.state_dict(), adapter, heads),
        decoupled_config(model.config, adapter, heads),
    )
    write_checkpoint(tmp_path, state, config, source=tmp_path, dtype=torch.bfloat16)
    description = describe(locate(str(tmp_path)))
    assert description.family == "dha_llama"
    assert description.key_heads == (3, 1)
    assert description.value_heads == (2, 4)
    assert description.kv_bytes_per_token == 10 * 8 * 2
    assert description.dtype == "bfloat16"
    assert not any(method.applies for method in description.methods)


def test_rope_is_told_with_its_scaling(tmp_path):
    scaling = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    rope = described(tmp_path / "llama", "llama", rope_parameters=scaling).rope
    assert (rope.kind, rope.channels, rope.theta, rope.scaling, rope.factor) == ("full", 8, 5e5, "linear", 4.0)
    assert described(tmp_path / "gpt_neox", "gpt_neox").rope.kind == "partial"
    assert described(tmp_path / "gpt2", "gpt2").rope.kind == "none"


def test_a_tied_embedding_counts_once_though_stored_twice(tmp_path):
    from safetensors.torch import load_file, save_file

    expected = described(tmp_path, "llama", tie_word_embeddings=True).parameters
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert describe(locate(str(tmp_path))).parameters == expected


def test_pickles_are_described_when_allowed(tmp_path):
    model = pico("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        describe(locate(str(tmp_path)))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert describe(locate(str(tmp_path), allow_pickle=True)).parameters == count


def test_only_headers_are_read(tmp_path):
    described(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        size = file.stat().st_size
        handle.truncate(8 + length)
        handle.truncate(size)  # the numbers are gone, the header and the length are not
    assert describe(locate(str(tmp_path))).parameters > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_hidden_layers": 3}, "layer 2 has no attention tensors"),
        ({"num_hidden_layers": 1}, "the weights have more"),
        ({"num_key_value_heads": 2}, "k_proj"),
    ],
    ids=str,
)
def test_weights_that_the_configuration_contradicts_are_refused(tmp_path, changed, message):
    described(tmp_path, "llama")
    edit_config(tmp_path, **changed)
    with pytest.raises(CheckpointError, match=message):
        describe(locate(str(tmp_path)))


def test_a_family_without_adapter_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedArchitectureError, match="recurrent"):
        describe(locate(str(tmp_path)))
