"""Cases: what is counted is right, what does not fit is said, the model is left as it was. No times are judged."""

from dataclasses import replace

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from headfuse.benchmark import cases
from headfuse.benchmark.attention import noting, seconds_per_step
from headfuse.benchmark.cases import Bench, Case, Load, largest_batch
from headfuse.benchmark.timing import copy_rate, median_seconds, seconds_of_each
from headfuse.errors import ConfigError
from headfuse.evaluation.cache_bytes import computed_cache_bytes
from pico import logits_of, pico, tokens
from pico_dha import pico_dha

CPU = torch.device("cpu")
LOAD = Load(contexts=(32,), batches=(2,), new_tokens=3)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")


@pytest.mark.parametrize("make", [pico, pico_dha])
@pytest.mark.parametrize("prefill", [True, False])
def test_a_case_counts_tokens_bytes_and_shares(make, prefill):
    model = make("llama")
    case = Bench("pico", model, 1e9).measure(2, 32, replace(LOAD, prefill=prefill))
    per_token = computed_cache_bytes(model.config, torch.float32)
    assert case.fits
    assert case.cache_bytes == 2 * 32 * per_token
    assert (case.first_token_seconds is not None) == prefill
    assert case.tokens_per_second == pytest.approx(2 / case.step_seconds)
    read = case.attention_gb_s * case.attention_microseconds * 1e3  # bytes of a layer
    assert read * model.config.num_hidden_layers == pytest.approx(case.cache_bytes)
    assert case.copy_fraction == pytest.approx(case.attention_gb_s)
    assert case.largest_batch is None


def test_compiled_steps_are_measured_with_their_attention(monkeypatch):
    monkeypatch.setattr("headfuse.models.compiled.BACKEND", "aot_eager")
    model = pico_dha("llama")
    case = Bench("pico", model, 1e9, compiled=True).measure(2, 32, LOAD)
    assert case.compiled
    assert case.cache_bytes == 2 * 256 * computed_cache_bytes(model.config, torch.float32)  # a fixed step's room
    assert case.step_seconds > 0
    assert case.attention_microseconds > 0


def test_a_case_that_does_not_fit_says_so(monkeypatch):
    monkeypatch.setattr(cases, "memory_beside", lambda device: 1000)
    case = Bench("pico", pico("llama"), 1e9).measure(2, 32, LOAD)
    assert not case.fits
    assert case.step_seconds is case.tokens_per_second is case.attention_gb_s is None


def test_running_out_of_memory_is_no_failure(monkeypatch):
    def exhausted(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cases, "Decoding", exhausted)
    assert not Bench("pico", pico("llama"), 1e9).measure(2, 32, LOAD).fits


def test_the_largest_batch_pays_for_rows_and_for_one_block_of_the_prefill():
    case = Case("model", batch=4, context=4096, cache_bytes=400, captured=True)
    assert largest_batch(1000, case, decoding=0, reading=0) == 10
    assert largest_batch(1000, case, decoding=100, reading=0) == 8  # 125 a row
    assert largest_batch(1000, case, decoding=100, reading=300) == 5  # four rows of 4096 are a block
    assert largest_batch(1000, replace(case, batch=1, cache_bytes=100), decoding=25, reading=75) == 5
    assert largest_batch(100, case, decoding=0, reading=300) == 0


def test_a_context_shorter_than_its_steps_is_refused():
    with pytest.raises(ConfigError, match="wanted contexts of more than 34 tokens, as many as are timed, got 20"):
        Load(contexts=(64, 20))


@pytest.mark.parametrize(
    ("make", "implementation"), [(pico, "sdpa"), (pico, "headfuse"), (pico_dha, "sdpa"), (pico_dha, "eager")]
)
def test_noted_attention_can_be_made_again_and_leaves_the_model_as_it_was(make, implementation):
    model, ids = make("llama"), tokens(2, 8)
    model.set_attn_implementation(implementation)
    function = ALL_ATTENTION_FUNCTIONS.get(implementation)
    before = logits_of(model, ids)
    with noting(model) as calls:
        assert torch.equal(logits_of(model, ids), before)
    assert len(calls) == model.config.num_hidden_layers
    assert ALL_ATTENTION_FUNCTIONS.get(implementation) is function
    assert torch.equal(logits_of(model, ids), before)
    assert len(calls) == model.config.num_hidden_layers
    outputs = [call.function(*call.arguments, **call.options)[0] for call in calls]
    assert outputs[0].shape[:2] == (2, 8)
    with torch.no_grad():
        assert seconds_per_step(calls, CPU, captured=False) > 0


def test_attention_that_is_no_function_of_the_interface_is_not_timed():
    model = pico("llama")
    model.set_attn_implementation("eager")
    case = Bench("pico", model, 1e9).measure(2, 32, LOAD)
    assert case.step_seconds is not None
    assert case.attention_microseconds is case.attention_gb_s is case.copy_fraction is None


def test_clocks_count_calls():
    calls = []
    assert len(seconds_of_each(lambda: calls.append(1), CPU, 4)) == 4
    assert len(calls) == 4
    assert median_seconds(lambda: calls.append(1), CPU) >= 0
    assert len(calls) > 5


def test_the_copy_rate_is_positive(monkeypatch):
    monkeypatch.setattr("headfuse.benchmark.timing.COPY_BYTES", {"cpu": 2**12})
    assert copy_rate(CPU) > 0


@needs_gpu
@pytest.mark.parametrize("make", [pico, pico_dha])
def test_a_gpu_reports_its_memory(make):
    model = make("llama").to("cuda")
    model.set_attn_implementation("headfuse")
    case = Bench("pico", model, 1e12).measure(2, 64, LOAD)
    assert case.captured
    assert case.fits
    assert case.peak_bytes > case.cache_bytes > 0
    assert case.largest_batch > 2
    assert case.attention_microseconds > 0
