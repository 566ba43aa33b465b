"""`attn_implementation="headfuse"` against "sdpa": every decoupled family, every cache, every mask, gradients."""

import pytest
import torch
from test_dha import MAPS, TIGHT, generated, pico_dha
from torch.testing import assert_close
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

import headfuse.models.attention as subject
from headfuse.checkpoints.loading import load_model
from headfuse.models.attention import headfuse_attention, headfuse_mask, rows_of
from headfuse.ops.decoupled_attention import dispatch
from pico import every_family, logits_of, pico, tokens

BACKENDS = ["", *(["triton"] if dispatch.HAS_TRITON else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda name: name or "chosen")
WIDE = {"head_dim": 16}  # the narrowest heads that the kernels take
every_cache = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])


def pair(family, device="cpu", **overrides):
    """The same decoupled model twice: with "sdpa" and with "headfuse"."""
    usual, ours = (pico_dha(family, **overrides).to(device) for _ in range(2))
    ours.set_attn_implementation("headfuse")
    return usual, ours


def cache_of(model, static):
    return StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)


@every_family
@every_cache
def test_cached_decoding_equals_a_full_prefill(family, static):
    usual, ours = pair(family)
    ids = tokens(2, 12)
    cache = cache_of(ours, static)
    chunks = [ids[:, :5], ids[:, 5:8], *ids[:, 8:].split(1, dim=1)]
    steps = torch.cat([logits_of(ours, chunk, past_key_values=cache) for chunk in chunks], dim=1)
    assert_close(logits_of(ours, ids), logits_of(usual, ids), **TIGHT)
    assert_close(steps, logits_of(usual, ids), **TIGHT)


@every_family
def test_generation_agrees_with_padding_caches_and_beams(family):
    usual, ours = pair(family)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for options in ({}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}):
        wanted = generated(usual, ids, attention_mask=mask, **options)
        assert torch.equal(generated(ours, ids, attention_mask=mask, **options), wanted), options


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="no Triton")
@every_cache
def test_the_kernels_generate_the_same(static, device, monkeypatch):
    usual, ours = pair("mistral", device, **WIDE)
    monkeypatch.setattr(dispatch, "OVERRIDE", "triton")
    ids = tokens(2, 9).to(device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"cache_implementation": "static"} if static else {}
    wanted = generated(usual, ids, attention_mask=mask, **options)
    assert torch.equal(generated(ours, ids, attention_mask=mask, **options), wanted)


@every_family
def test_a_training_step_has_the_same_gradients(family):
    usual, ours = pair(family)
    ids = tokens(2, 10)
    for model in (usual, ours):  # without dropout, which draws
        model.requires_grad_()(ids, labels=ids).loss.backward()
    for (name, wanted), got in zip(usual.named_parameters(), ours.parameters(), strict=True):
        assert_close(got.grad, wanted.grad, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@every_backend
@pytest.mark.parametrize("padding", ["left", "right", "hole", "none"])
def test_every_padding_mask_is_obeyed(padding, backend, device, monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", backend)
    usual, ours = pair("mistral", device, **WIDE)
    ids = tokens(3, 10).to(device)
    mask = torch.ones_like(ids)
    mask[1, {"left": slice(0, 3), "right": slice(7, 10), "hole": slice(4, 6), "none": slice(0, 0)}[padding]] = 0
    got, wanted = (logits_of(model, ids, attention_mask=mask) for model in (ours, usual))
    assert_close(got[mask.bool()], wanted[mask.bool()], **TIGHT)


@every_backend
def test_packed_rows_and_ready_masks_are_obeyed(backend, device, monkeypatch):
    monkeypatch.setattr(dispatch, "OVERRIDE", backend)
    usual, ours = pair("mistral", device, **WIDE)
    ids = tokens(2, 10).to(device)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]] * 2, device=device)
    assert_close(logits_of(ours, ids, position_ids=positions), logits_of(usual, ids, position_ids=positions), **TIGHT)
    whole = torch.ones(2, 1, 10, 10, dtype=torch.bool, device=device).tril()
    whole[:, :, 6:, :6] = False
    assert_close(logits_of(ours, ids, attention_mask=whole), logits_of(usual, ids, attention_mask=whole), **TIGHT)


def test_attention_dropout_is_applied():
    _, ours = pair("llama")
    for layer in ours.model.layers:
        object.__setattr__(layer.self_attn.shape, "dropout", 0.5)
    ours.train()
    first, second = (logits_of(ours, tokens(1, 8)) for _ in range(2))
    assert not torch.equal(first, second)


def test_stock_models_run_with_it_too():
    for family, heads in (("llama", {"num_key_value_heads": 2}), ("gpt2", {})):
        usual, ours = pico(family, **heads), pico(family, **heads)
        ours.set_attn_implementation("headfuse")
        ids = tokens(2, 9)
        assert_close(logits_of(ours, ids), logits_of(usual, ids), **TIGHT)
        assert torch.equal(generated(ours, ids), generated(usual, ids))


def test_no_layer_repeats_its_heads_to_decode(monkeypatch):
    _, ours = pair("llama")
    cache = DynamicCache(config=ours.config)
    logits_of(ours, tokens(1, 5), past_key_values=cache)
    seen = []
    monkeypatch.setattr(subject, "attention", lambda *a, **k: seen.append(a[1:3]) or dispatch.attention(*a, **k))
    logits_of(ours, tokens(1, 1), past_key_values=cache)
    counts = [(max(keys) + 1, max(values) + 1) for keys, values in MAPS]
    assert [(key.shape[1], value.shape[1]) for key, value in seen] == counts
    held = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert [(key.data_ptr(), value.data_ptr()) for key, value in seen] == held


def test_the_mask_says_where_rows_begin_and_end():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    for offset in (4, torch.tensor(4)):
        mask = headfuse_mask(3, 1, 8, offset, attention_mask=padding)
        rows = rows_of(mask)
        assert rows.starts.tolist() == [2, 0, 5]
        assert rows.lengths.tolist() == [5, 5, 5]
    assert headfuse_mask(2, 5, 5) is None
    assert headfuse_mask(2, 5, 5, attention_mask=padding[1:2]) is None
    assert headfuse_mask(2, 5, 16) is None  # a static cache that was empty
    assert rows_of(headfuse_mask(2, 3, 8, 5)).lengths.tolist() == [8, 8]


def test_masks_that_are_not_left_padding_come_from_transformers():
    hole = torch.tensor([[1, 0, 1, 1, 1]]).bool()
    windowed = {"mask_function": sliding_window_causal_mask_function(3), "local_size": 3}
    for options in ({"attention_mask": hole}, windowed):
        mask = headfuse_mask(1, 5, 5, **{"mask_function": causal_mask_function, **options})
        assert mask.shape == (1, 1, 5, 5)
        assert mask.dtype == torch.bool


def test_compiled_decoding_is_the_same():
    usual, ours = pair("llama")
    ids = tokens(2, 9)
    cache = StaticCache(config=ours.config, max_cache_len=16)
    logits_of(ours, ids[:, :8], past_key_values=cache)
    mask = headfuse_mask(2, 1, 16, torch.tensor(8))
    torch.compiler.reset()
    step = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = step(ids[:, 8:], attention_mask=mask, past_key_values=cache, position_ids=torch.tensor([[8], [8]])).logits
    assert_close(got, logits_of(usual, ids)[:, 8:], **TIGHT)


def test_it_is_registered_where_decoupled_models_are():
    assert AttentionInterface()["headfuse"] is headfuse_attention
    assert AttentionMaskInterface()["headfuse"] is headfuse_mask


def test_a_decoupled_model_loaded_on_a_cpu_decodes_in_place(tmp_path):
    pico_dha("llama").save_pretrained(tmp_path / "decoupled")
    pico("llama").save_pretrained(tmp_path / "stock")
    loaded = load_model(tmp_path / "decoupled")
    assert loaded.config._attn_implementation == "headfuse"
    assert load_model(tmp_path / "stock").config._attn_implementation == "sdpa"
    ids = tokens(2, 8)
    assert_close(logits_of(loaded, ids), logits_of(pico_dha("llama"), ids), **TIGHT)
    loaded.save_pretrained(tmp_path / "again")
    assert "headfuse" not in (tmp_path / "again" / "config.json").read_text()


def test_compiled_masks_are_the_same():
    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    torch.compiler.reset()
    compiled = torch.compile(headfuse_mask, fullgraph=True, backend="aot_eager")
    got = compiled(2, 1, 8, torch.tensor(4), attention_mask=padding)
    assert torch.equal(got, headfuse_mask(2, 1, 8, torch.tensor(4), attention_mask=padding))
