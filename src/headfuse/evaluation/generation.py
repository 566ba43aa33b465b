"""Samples of text from a model."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from headfuse.errors import ConfigError
from headfuse.evaluation.inference import device_of, measuring


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """What `model` writes after `prompt`, without the prompt; temperature 0 always takes the likeliest token.

    The global random state is left as it was. Raises ConfigError for a negative temperature, no new tokens, or a
    prompt without tokens.
    """
    if temperature < 0 or max_new_tokens < 1:
        raise ConfigError(
            f"wanted temperature >= 0 and at least 1 new token, got {temperature} and {max_new_tokens}; raise them"
        )
    device = device_of(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device=device, dtype=torch.int64)
    if not ids.numel():
        raise ConfigError("wanted a prompt of at least one token, got none; write some text")
    stop = model.generation_config.eos_token_id
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0 if temperature else None,
        top_p=1.0 if temperature else None,
        eos_token_id=stop,
        pad_token_id=stop[0] if isinstance(stop, list) else stop if stop is not None else 0,
    )
    devices = [device] if device.type == "cuda" else []
    with measuring(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        generate: Any = model.generate  # declared as a tensor by nn.Module
        output = generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
