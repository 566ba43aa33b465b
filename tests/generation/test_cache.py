"""The preallocated cache: sliced and fixed steps compute what a full pass does, and see nothing of the empty room."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from headfuse.generation.cache import PreallocatedCache
from pico import every_family, logits_of, pico, tokens
from pico_dha import pico_dha

TIGHT = {"atol": 1e-4, "rtol": 0.0}


@every_family
@pytest.mark.parametrize("make", [pico, pico_dha])
def test_sliced_steps_of_any_length_equal_a_full_pass(family, make):
    model, ids = make(family), tokens(2, 12)
    cache = PreallocatedCache.for_model(model, 2, 20)
    parts = [logits_of(model, part, past_key_values=cache) for part in ids.split([5, 1, 4, 1, 1], dim=1)]
    assert_close(torch.cat(parts, dim=1), logits_of(model, ids), **TIGHT)
    assert cache.get_seq_length() == 12


@every_family
@pytest.mark.parametrize("make", [pico, pico_dha])
def test_fixed_steps_see_nothing_of_the_empty_room(family, make):
    model, ids = make(family), tokens(2, 12)
    cache = PreallocatedCache.for_model(model, 2, 32, fixed=True)
    steps = [logits_of(model, ids[:, :5], past_key_values=cache.of_rows(slice(None)))]
    for tensor in cache.tensors():
        tensor[:, :, 5:] = 100.0  # would drown the rest
    cache.hold(5)
    mask = torch.ones(2, 32, dtype=torch.bool)
    for t in range(5, 12):
        cache.begin()
        at = torch.full((2, 1), t)
        one = ids[:, t : t + 1]
        steps.append(logits_of(model, one, past_key_values=cache, attention_mask=mask, position_ids=at))
        assert [layer.get_seq_length().item() for layer in cache.layers] == [t + 1] * len(cache.layers)
        cache.end()
    assert_close(torch.cat(steps, dim=1), logits_of(model, ids), **TIGHT)


def test_blocks_of_rows_fill_the_cache_of_the_batch():
    model, ids = pico_dha("llama"), tokens(5, 7)
    cache, whole = PreallocatedCache.for_model(model, 5, 9), DynamicCache(config=model.config)
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        logits_of(model, ids[rows], past_key_values=cache.of_rows(rows))
    logits_of(model, ids, past_key_values=whole)
    for ours, theirs in zip(cache.buffers, whole.layers, strict=True):
        assert_close(ours.keys[:, :, :7], theirs.keys, **TIGHT)
        assert_close(ours.values[:, :, :7], theirs.values, **TIGHT)


@every_family
@pytest.mark.parametrize("make", [pico, pico_dha])
def test_generate_of_transformers_takes_the_cache(family, make):
    model, ids = make(family), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    cache = PreallocatedCache.for_model(model, 2, 24)
    assert torch.equal(
        model.generate(ids * mask, past_key_values=cache, **options), model.generate(ids * mask, **options)
    )


def test_a_cleared_cache_holds_nothing():
    model, ids = pico("llama"), tokens(2, 6)
    cache = PreallocatedCache.for_model(model, 2, 8)
    logits_of(model, ids, past_key_values=cache)
    cache.clear()
    assert cache.get_seq_length() == 0
    assert not any(tensor.any() for tensor in cache.tensors())


def test_a_filled_cache_holds_random_keys_and_values_of_a_seed():
    model = pico("llama")
    first, again = PreallocatedCache.for_model(model, 2, 40), PreallocatedCache.for_model(model, 2, 40)
    for cache in (first, again):
        logits_of(model, tokens(2, 1), past_key_values=cache)
        cache.fill(30, torch.Generator().manual_seed(3))
    for one, other in zip(first.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other)
        assert one[:, :, :30].std() == pytest.approx(1, abs=0.2)
        assert not one[:, :, 30:].any()
    assert first.get_seq_length() == 30
