"""Loss on text: what the model itself says, whatever the batches and chunks, and zero distance to itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from headfuse.errors import CheckpointError, ConfigError
from headfuse.evaluation.text_loss import batch_sums, measure_text_loss
from headfuse.text.rows import TokenRows
from pico import logits_of, pico, tokens


@pytest.fixture(scope="module")
def model():
    return pico("llama")


@pytest.fixture(scope="module")
def other():
    return pico("llama", num_key_value_heads=2)


def text(domains=("a", "b")):
    return TokenRows(tokens(6, 20), domains, torch.arange(6) % len(domains))


def test_cross_entropy_is_the_models_own_loss(model):
    rows = text(("a",))
    found = measure_text_loss(model, rows)
    with torch.no_grad():
        own = model(rows.tokens, labels=rows.tokens).loss.item()
    assert found.overall.cross_entropy == pytest.approx(own, rel=1e-5)
    assert found.overall.perplexity == pytest.approx(math.exp(own), rel=1e-4)
    assert found.overall.tokens == 6 * 19
    assert found.domains == {}
    assert found.overall.kl is None


def test_a_model_is_at_no_distance_from_itself(model):
    found = measure_text_loss(model, text(), reference=model).overall
    assert found.kl == pytest.approx(0.0, abs=1e-7)
    assert found.top1_agreement == 1.0
    assert found.reference_cross_entropy == found.cross_entropy


def test_distance_is_that_of_the_definition(model, other):
    rows = text()
    found = measure_text_loss(model, rows, reference=other)
    log_p, log_q = (logits_of(one, rows.tokens)[:, :-1].double().log_softmax(-1) for one in (model, other))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert found.overall.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.domains["b"].kl == pytest.approx(kl[1::2].mean().item(), rel=1e-5)
    agree = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert found.overall.top1_agreement == pytest.approx(agree)
    loss = F.nll_loss(log_q.flatten(0, 1), rows.tokens[:, 1:].flatten()).item()
    assert found.overall.reference_cross_entropy == pytest.approx(loss, rel=1e-5)


def test_batches_and_chunks_do_not_change_the_result(model, other, monkeypatch):
    rows = text()
    whole = measure_text_loss(model, rows, reference=other).as_dict()
    monkeypatch.setattr("headfuse.evaluation.text_loss.CHUNK_BYTES", 3 * 2 * 96 * 4)
    small = measure_text_loss(model, rows, reference=other, batch_tokens=40).as_dict()
    for found in (whole, small):
        del found["tokens_per_second"], found["precision"]
    assert small["domains"]["a"] == pytest.approx(whole["domains"]["a"], rel=1e-5)
    del small["domains"], whole["domains"]
    assert small == pytest.approx(whole, rel=1e-5)


def test_domains_average_to_the_whole(model):
    found = measure_text_loss(model, text(("a", "b", "c")))
    assert list(found.domains) == ["a", "b", "c"]
    mean = sum(values.cross_entropy * values.tokens for values in found.domains.values()) / found.overall.tokens
    assert mean == pytest.approx(found.overall.cross_entropy)


def test_bits_per_byte_counts_the_bytes_given(model):
    rows = text()
    found = measure_text_loss(model, rows, row_bytes=torch.tensor([10, 20, 30, 40, 50, 60]))
    nats = found.overall.cross_entropy * found.overall.tokens
    assert found.overall.bits_per_byte == pytest.approx(nats / math.log(2) / 210)
    nats = found.domains["a"].cross_entropy * found.domains["a"].tokens
    assert found.domains["a"].bits_per_byte == pytest.approx(nats / math.log(2) / 90)


def test_bf16_is_close_and_says_so(model):
    full, half = (measure_text_loss(model, text(), precision=precision) for precision in ("fp32", "bf16"))
    assert half.precision == "bf16"
    assert half.overall.cross_entropy != full.overall.cross_entropy
    assert half.overall.cross_entropy == pytest.approx(full.overall.cross_entropy, rel=0.02)


def test_modes_of_the_model_are_restored_and_progress_is_told():
    model, advances = pico("llama").train(), []
    model.model.layers[0].eval()

    from contextlib import contextmanager

    @contextmanager
    def stages(name, total, unit):
        advances.append((name, total, unit))
        yield advances.append

    measure_text_loss(model, text(), batch_tokens=40, progress=stages)
    assert advances == [("evaluate", 120, "tokens"), 40, 40, 40]
    assert model.training
    assert not model.model.layers[0].training


def test_families_that_cap_their_logits_are_measured_as_they_run():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=48, final_logit_softcapping=0.5, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model, rows = Gemma2ForCausalLM(config).eval(), text()
    expected = F.cross_entropy(logits_of(model, rows.tokens)[:, :-1].flatten(0, 1), rows.tokens[:, 1:].flatten())
    assert measure_text_loss(model, rows).overall.cross_entropy == pytest.approx(expected.item(), rel=1e-5)


def test_broken_weights_are_an_error():
    model = pico("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(CheckpointError, match="wanted finite logits"):
        measure_text_loss(model, text())


def test_a_bad_precision_and_another_vocabulary_are_errors(model):
    with pytest.raises(ConfigError, match="wanted a precision of fp32 or bf16, got 'fp8'"):
        measure_text_loss(model, text(), precision="fp8")
    with pytest.raises(ConfigError, match="wanted a reference with the model's 96 tokens, got 100"):
        measure_text_loss(model, text(), reference=pico("llama", vocab_size=100))


def test_half_precision_logits_are_summed_in_full():
    logits = torch.randn(2, 9, 50).bfloat16()
    ids = torch.randint(50, (2, 9))
    expected = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none").sum(1)
    assert batch_sums(ids, logits)[:, 0].tolist() == pytest.approx(expected.tolist(), rel=1e-5)
