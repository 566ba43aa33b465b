"""Running a model layer by layer: the same inputs as a full forward, and nothing left behind on the way."""

import pytest
import torch
from torch.testing import assert_close

from headfuse.checkpoints.assembly import attention_module, decoder_layers
from headfuse.checkpoints.registry import adapter_for
from headfuse.statistics import stream
from headfuse.statistics.stream import stream_layers
from pico import every_case, logits_of, pico, tokens


def opened(model):
    """Pairs of decoder layer and attention module."""
    adapter = adapter_for(model.config)
    return [(layer, attention_module(model, adapter, i)) for i, layer in enumerate(decoder_layers(model, adapter))]


def seen_by_hooks(model, layers, rows):
    """What reaches every layer and every attention module in one full forward: (stream, hidden, positions)."""
    streams, calls, handles = [], [], []

    def hidden(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    for layer, attention in layers:
        handles.append(layer.register_forward_pre_hook(lambda _, a, k: streams.append(hidden(a, k)), with_kwargs=True))
        handles.append(
            attention.register_forward_pre_hook(
                lambda _, a, k: calls.append((hidden(a, k), k.get("position_embeddings"))), with_kwargs=True
            )
        )
    logits_of(model, rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return [(x, *call) for x, call in zip(streams, calls, strict=True)]


@every_case
def test_inputs_are_exactly_those_of_a_full_forward(family, overrides):
    model, rows = pico(family, **overrides), tokens(3, 10)
    layers = opened(model)
    expected = seen_by_hooks(model, layers, rows)
    found = list(stream_layers(model, layers, rows))
    assert [inputs.layer for inputs in found] == list(range(len(layers)))
    for inputs, (residual, hidden, positions) in zip(found, expected, strict=True):
        assert torch.equal(inputs.hidden, hidden)
        assert_close(inputs.stream_energy, residual.pow(2).mean(-1))
        assert (inputs.positions is None) == (positions is None)
        if inputs.positions is not None:
            for mine, theirs in zip(inputs.positions, positions, strict=True):
                assert torch.equal(mine, theirs[:1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_batches_join_to_the_whole(family, monkeypatch):
    model, rows = pico(family), tokens(5, 8)
    whole = list(stream_layers(model, opened(model), rows))
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", 16)
    for parts, inputs in zip(stream_layers(model, opened(model), rows), whole, strict=True):
        assert_close(parts.hidden, inputs.hidden, atol=1e-5, rtol=1e-5)
        assert_close(parts.stream_energy, inputs.stream_energy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_context_is_open_at_a_yield(precision):
    model = pico("llama")
    for _ in stream_layers(model, opened(model), tokens(2, 8), precision=precision):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_inputs_carry_no_graph():
    model = pico("gpt2").requires_grad_(True)
    for inputs in stream_layers(model, opened(model), tokens(2, 8)):
        assert not inputs.hidden.requires_grad
        assert not inputs.stream_energy.requires_grad


def test_an_abandoned_stream_leaves_the_model_as_it_was():
    model, rows = pico("gpt_neox"), tokens(2, 8)
    before = logits_of(model, rows)
    for _ in stream_layers(model, opened(model), rows):
        break
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(logits_of(model, rows), before)


def test_progress_adds_up_to_tokens_times_layers():
    model, rows, steps = pico("llama"), tokens(3, 8), []
    list(stream_layers(model, opened(model), rows, advance=steps.append))
    assert sum(steps) == rows.numel() * 2


def test_bf16_autocast_is_near_fp32():
    model, rows = pico("llama"), tokens(2, 8)
    exact, rounded = (list(stream_layers(model, opened(model), rows, precision=p)) for p in ("fp32", "bf16"))
    for a, b in zip(exact, rounded, strict=True):
        error = (a.hidden - b.hidden.float()).norm() / a.hidden.norm()
        assert error < 0.05
    assert not torch.equal(exact[1].hidden, rounded[1].hidden.float())
