"""The gated merge: exactly the source at one end, exactly the merged layer at the other."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from headfuse.checkpoints.assembly import decoder_layers, stock_config, stock_model_state
from headfuse.checkpoints.attention import attention_of, attention_replaced
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.conversion import Settings, convert_heads
from headfuse.gating.merge import (
    GatedNorm,
    GatedOutput,
    GatedProjection,
    gate_attention,
    gated_parts,
    merged_heads,
    merged_parameters,
    mix,
)
from headfuse.sharing.refit import RefitOptions
from pico import logits_of, pico, tokens

# Grouped queries, biases, clipping, norms over a head and over all heads, partial rotation.
MODELS = [
    ("llama", {}),
    ("llama", {"attention_bias": True}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("olmo", {}),
    ("olmo2", {}),
    ("phi", {}),
    ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
]
STARTS = {
    "mean-pool": {"method": "mean-pool", "refit": None},
    "procrustes": {"method": "procrustes", "refit": None},
    "closed-form": {"refit": None},
    "closed-form, refitted": {"refit": RefitOptions(steps=3, rows=2, length=16)},
}
models = pytest.mark.parametrize(("family", "overrides"), MODELS, ids=str)
starts = pytest.mark.parametrize("start", STARTS)


def opened(family="llama", **overrides):
    model = pico(family, **overrides).requires_grad_(False)
    return LoadedModel.of(model, adapter_for(model.config))


class Pair:
    """A model, its merged heads (stock GQA of half the heads) and the gated modules between them."""

    def __init__(self, family="llama", start="closed-form", **overrides):
        self.loaded = opened(family, **overrides)
        heads = self.loaded.heads[0].num_key_heads // 2
        settings = Settings(target="gqa", key_heads=heads, value_heads=heads, **STARTS[start])
        converted = convert_heads(self.loaded, tokens(8, 32), settings)
        self.merged = converted.heads
        self.source = [
            layer.reordered(sorted(range(len(plan.key_map)), key=plan.key_map.__getitem__))
            for layer, plan in zip(self.loaded.heads, converted.plan.layers, strict=True)
        ]
        self.modules = [attention_of(layer, index) for index, layer in enumerate(self.source)]
        for module, source, merged in zip(self.modules, self.source, self.merged, strict=True):
            gate_attention(module, source, merged)

    def logits(self, gates):
        for module, source in zip(self.modules, self.source, strict=True):
            for part in gated_parts(module):
                part.gates = gates[: source.num_key_heads]
        with attention_replaced(self.loaded.layers, dict(enumerate(self.modules))):
            return logits_of(self.loaded.model, tokens(2, 11))

    def folded(self):
        return [merged_heads(module, layer) for module, layer in zip(self.modules, self.merged, strict=True)]


@models
@starts
def test_open_gates_are_the_source_model(family, overrides, start):
    pair = Pair(family, start, **overrides)
    wanted = logits_of(pair.loaded.model, tokens(2, 11))
    assert_close(pair.logits(torch.ones(8)), wanted, atol=1e-5, rtol=1e-5)


@models
@starts
def test_closed_gates_are_the_exported_stock_model(family, overrides, start, tmp_path):
    pair = Pair(family, start, **overrides)
    with torch.no_grad():  # as training would
        for index, module in enumerate(pair.modules):
            generator = torch.Generator().manual_seed(index)
            for parameter in merged_parameters(module):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    found = pair.logits(torch.zeros(8))
    heads, stock = pair.folded(), pair.loaded.model
    state = stock_model_state(stock.state_dict(), pair.loaded.adapter, heads)
    config = stock_config(stock.config, pair.loaded.adapter, heads)
    exported = type(stock)(config).eval()
    exported.load_state_dict(state)
    exported.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_key_value_heads"] == len(heads[0].k)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(stock)
    assert_close(logits_of(loaded, tokens(2, 11)), found, atol=1e-5, rtol=1e-5)


@starts
def test_a_gate_between_the_ends_mixes_one_head_of_keys_and_values(start):
    pair = Pair("qwen2", start)
    module, source, merged = pair.modules[0], pair.source[0], pair.merged[0]
    gates = torch.tensor([1.0, 0.25, 0.0, 0.5])
    x = torch.randn(2, 5, source.hidden_size, generator=torch.Generator().manual_seed(0))
    groups = dict(zip(source.key_map, merged.key_map, strict=True))
    for name in ("k", "v"):
        part = getattr(module, f"{name}_proj")
        part.gates = gates
        own, shared = getattr(source, name), getattr(merged, name)
        own_bias, shared_bias = getattr(source, f"{name}_bias"), getattr(merged, f"{name}_bias")
        found = part(x).unflatten(-1, (4, -1))
        for head, z in enumerate(gates):
            group = groups[head]
            alone = x @ own[head].mT + own_bias[head]
            together = x @ shared[group].mT + shared_bias[group]
            assert_close(found[..., head, :], z * alone + (1 - z) * together, atol=1e-5, rtol=1e-5)


def test_a_mix_is_one_end_to_the_last_bit():
    own, merged = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(mix(own, merged, torch.ones(3)), own)
    assert torch.equal(mix(own, merged, torch.zeros(3)), merged)


def test_what_pooling_leaves_alone_is_not_gated():
    kinds = {name: type(part) for name, part in Pair(start="mean-pool").modules[0].named_children()}
    assert kinds["k_proj"] is kinds["v_proj"] is GatedProjection
    assert kinds["q_proj"] is kinds["o_proj"] is torch.nn.Linear


def test_what_the_closed_form_changes_is_gated_too():
    kinds = {name: type(part) for name, part in Pair().modules[0].named_children()}
    assert kinds == {
        "q_proj": GatedProjection,
        "k_proj": GatedProjection,
        "v_proj": GatedProjection,
        "o_proj": GatedOutput,
    }


def test_gains_that_the_refit_changed_are_mixed():
    kinds = {name: type(part) for name, part in Pair("qwen3", "closed-form, refitted").modules[0].named_children()}
    assert kinds["k_norm"] is GatedNorm


def test_gradients_reach_the_gates_the_source_and_the_merged_heads():
    pair = Pair()
    gates = torch.full((4,), 0.5, requires_grad=True)
    module = pair.modules[0]
    for part in gated_parts(module):
        part.gates = gates
    module.requires_grad_(True)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    cos = sin = torch.ones(1, 5, 8)
    module(x, position_embeddings=(cos, sin))[0].pow(2).mean().backward()
    for parameter in (gates, *module.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_the_merged_heads_are_those_that_were_handed_in():
    pair = Pair("qwen3", "closed-form, refitted")
    for found, wanted in zip(pair.folded(), pair.merged, strict=True):
        for name in ("q", "k", "v", "o", "q_norm", "k_norm"):
            assert_close(getattr(found, name), getattr(wanted, name), atol=1e-5, rtol=1e-4)


def test_blocks_with_gates_compile_whole_and_follow_the_gates():
    pair = Pair()
    blocks = decoder_layers(pair.loaded.model, pair.loaded.adapter)
    wanted = pair.logits(torch.tensor([1.0, 0.3, 0.0, 0.6]))
    for block in blocks:
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    found = pair.logits(torch.tensor([1.0, 0.3, 0.0, 0.6]))
    changed = pair.logits(torch.tensor([0.0, 0.3, 1.0, 0.6]))
    for block in blocks:
        block._compiled_call_impl = None
    assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert_close(changed, pair.logits(torch.tensor([0.0, 0.3, 1.0, 0.6])), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, changed, atol=1e-3)
