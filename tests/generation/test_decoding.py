"""The decode loop writes the tokens of `model.generate`, however steps are taken; graphs on a GPU only."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import headfuse.generation.decoding as decoding_module
from headfuse.errors import ConfigError
from headfuse.generation.decoding import Decoder, can_capture
from headfuse.generation.sampling import Sampling
from pico import every_family, pico, tokens
from pico_dha import pico_dha

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
aten = torch.ops.aten
OF_THE_HOST = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.lift_fresh, aten.equal}
every_kind = pytest.mark.parametrize("make", [pico, pico_dha])
every_step = pytest.mark.parametrize("fixed", [False, True], ids=["sliced", "fixed"])
NEW = 20


def ragged(rows: int = 3, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of several lengths, padded on the left."""
    ids, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(0, rows, 2):
        mask[row, : length // 2 + row] = 0
    return ids * mask, mask


def generated(model, ids, mask, **options) -> torch.Tensor:
    """What transformers writes."""
    options = {"do_sample": False, "max_new_tokens": NEW} | options
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


@every_family
@every_kind
@every_step
def test_tokens_are_those_of_generate(family, make, fixed):
    model, ids = make(family), tokens(2, 9)
    mask = torch.ones_like(ids)
    wanted = generated(model, ids, mask)
    assert torch.equal(Decoder(model, fixed=fixed).write(ids, max_new_tokens=NEW), wanted)


@every_family
@every_kind
@every_step
def test_ragged_prompts_write_what_they_write_with_generate(family, make, fixed):
    model, (ids, mask) = make(family), ragged()
    wanted = generated(model, ids, mask)
    assert torch.equal(Decoder(model, fixed=fixed).write(ids, mask, max_new_tokens=NEW), wanted)


@every_kind
@every_step
@pytest.mark.parametrize("implementation", ["eager", "headfuse"])
def test_every_attention_of_ours_writes_the_same(make, fixed, implementation):
    model, (ids, mask) = make("llama", num_key_value_heads=2) if make is pico else make("llama"), ragged()
    wanted = generated(model, ids, mask)
    model.set_attn_implementation(implementation)
    assert torch.equal(Decoder(model, fixed=fixed).write(ids, mask, max_new_tokens=NEW), wanted)


@every_step
def test_sliding_windows_are_obeyed(fixed):
    model, (ids, mask) = pico("mistral", sliding_window=4), ragged()
    wanted = generated(model, ids, mask)
    assert not torch.equal(generated(pico("mistral"), ids, mask), wanted)
    assert torch.equal(Decoder(model, fixed=fixed).write(ids, mask, max_new_tokens=NEW), wanted)


@every_step
@pytest.mark.parametrize("ends", [1, 2, 60])
def test_rows_end_where_they_end_with_generate(fixed, ends):
    model, (ids, mask) = pico_dha("llama"), ragged(4)
    free = generated(model, ids, mask)
    eos = sorted(set(free[:, 3 : 3 + ends].flatten().tolist()))
    wanted = generated(model, ids, mask, eos_token_id=eos, pad_token_id=0)
    found = Decoder(model, eos=eos, pad=0, fixed=fixed).write(ids, mask, max_new_tokens=NEW)
    assert torch.equal(found, wanted)


def test_the_host_looks_for_ends_once_in_a_while(monkeypatch):
    model, ids = pico("llama"), tokens(2, 5)
    eos = generated(model, ids, torch.ones_like(ids))[:, 2].tolist()
    wanted = Decoder(model, eos=eos).write(ids, max_new_tokens=NEW)
    steps = []
    step = decoding_module.Decoding.step
    monkeypatch.setattr(decoding_module.Decoding, "step", lambda self: (steps.append(1), step(self)))
    assert torch.equal(Decoder(model, eos=eos).write(ids, max_new_tokens=NEW), wanted)
    assert len(steps) == wanted.shape[1] - 1 < NEW - 1


def test_a_prefill_in_blocks_writes_the_same(monkeypatch):
    model, (ids, mask) = pico_dha("qwen3"), ragged(5)
    wanted = Decoder(model).write(ids, mask, max_new_tokens=NEW)
    monkeypatch.setattr(decoding_module, "PREFILL_TOKENS", 2 * ids.shape[1])
    assert torch.equal(Decoder(model).write(ids, mask, max_new_tokens=NEW), wanted)


@every_step
def test_a_decoder_writes_the_same_after_another_prompt(fixed):
    model, (ids, mask) = pico_dha("llama"), ragged()
    decoder = Decoder(model, fixed=fixed, room=64)
    wanted = decoder.write(ids, mask, max_new_tokens=NEW)
    decoder.write(tokens(3, 30, seed=4), max_new_tokens=25)
    held = decoder.held
    assert torch.equal(decoder.write(ids, mask, max_new_tokens=NEW), wanted)
    assert decoder.held is held


@every_step
def test_samples_follow_seed_and_row_and_leave_the_random_state(fixed):
    model, (ids, mask) = pico_dha("llama"), ragged()
    before = torch.get_rng_state()
    decoder = Decoder(model, sampling=Sampling(1.0, top_k=20, top_p=0.95), fixed=fixed)
    first, again, other = (decoder.write(ids, mask, max_new_tokens=NEW, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    alone = Decoder(model, sampling=Sampling(1.0, top_k=20, top_p=0.95))
    assert torch.equal(alone.write(ids[:1], mask[:1], max_new_tokens=NEW), first[:1])
    assert torch.equal(before, torch.get_rng_state())


def test_samples_of_much_temperature_and_one_kept_token_are_greedy():
    model, (ids, mask) = pico("llama"), ragged()
    wanted = Decoder(model).write(ids, mask, max_new_tokens=NEW)
    assert torch.equal(Decoder(model, sampling=Sampling(5.0, top_k=1)).write(ids, mask, max_new_tokens=NEW), wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": tokens(2, 5), "max_new_tokens": 0}, "at least 1 new token"),
        ({"ids": tokens(2, 0), "max_new_tokens": 4}, r"got prompts of shape \(2, 0\)"),
        ({"ids": tokens(2, 5), "max_new_tokens": 60}, "wanted room for 65 tokens a row, got 64"),
        (
            {"ids": tokens(1, 3), "mask": torch.tensor([[1, 1, 0]]), "max_new_tokens": 2},
            "wanted it on the left of a prompt",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(pico("llama"), room=64).write(**arguments)


class OnTheDevice(TorchDispatchMode):
    """Fails where the host reads a tensor, or makes one from numbers of its own: a graph can record neither."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in OF_THE_HOST, function
        return function(*args, **(kwargs or {}))


@every_family
@every_kind
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.7, top_k=5, top_p=0.9)], ids=str)
def test_a_fixed_step_is_work_for_the_device_alone(family, make, sampling):
    decoder = Decoder(make(family), sampling=sampling, eos=[3], fixed=True)
    decoder.write(*ragged(), max_new_tokens=2)
    with OnTheDevice():
        decoder.held.compute()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), OnTheDevice():
        bool(decoder.held.finished.all())


def test_nothing_is_captured_without_a_gpu():
    assert not can_capture(pico("llama"))


@needs_gpu
@every_family
@every_kind
@pytest.mark.parametrize("implementation", ["sdpa", "headfuse"])
def test_captured_steps_write_what_the_same_steps_write_as_they_are(family, make, implementation):
    model, (ids, mask) = make(family).to("cuda"), ragged()
    model.set_attn_implementation(implementation)
    for sampling in (Sampling(), Sampling(1.0, top_k=20, top_p=0.9)):
        options = {"sampling": sampling, "eos": [5, 6], "room": 256}
        captured = Decoder(model, captured=True, **options)
        plain = Decoder(model, captured=False, fixed=True, **options)
        for seed in (0, 1):  # the second time the graph is only replayed
            found = captured.write(ids, mask, max_new_tokens=40, seed=seed)
            assert torch.equal(found, plain.write(ids, mask, max_new_tokens=40, seed=seed))


@needs_gpu
def test_a_graph_is_used_again_for_prompts_of_the_same_room():
    model = pico_dha("llama").to("cuda")
    decoder = Decoder(model)
    assert decoder.steps.captured
    decoder.write(tokens(2, 9), max_new_tokens=NEW)
    graph = decoder.held.graph
    found = decoder.write(tokens(2, 30, seed=1), max_new_tokens=NEW)
    assert graph is not None
    assert decoder.held.graph is graph
    assert torch.equal(found, Decoder(model, captured=False).write(tokens(2, 30, seed=1), max_new_tokens=NEW))


@needs_gpu
def test_autocast_is_not_captured():
    with torch.autocast("cuda", torch.bfloat16):
        assert not can_capture(pico("llama").to("cuda"))
