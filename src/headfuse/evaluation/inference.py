"""How every measurement runs a model: in evaluation mode, without gradients, at the asked precision.

And what a model says of the texts that it can write: how long they may be, and where they end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from headfuse.errors import ConfigError
from headfuse.precision import Precision, precision_context

# The fp32 copy of the logits of one batch is kept below this.
MAX_LOGIT_BYTES = 2**28


@contextmanager
def measuring(*models: nn.Module, precision: Precision = "fp32") -> Iterator[None]:
    """Evaluation mode without gradients; `bf16` adds autocast, `fp32` runs the weights in their own dtype.

    Training modes are restored at the end. Raises ConfigError for another precision.
    """
    if precision not in get_args(Precision):
        raise ConfigError(f"wanted a precision of {' or '.join(get_args(Precision))}, got {precision!r}; choose one")
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad(), precision_context(device_of(models[0]), precision):
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter, for a language model its embedding, lives."""
    return next(model.parameters()).device


def ends_of(model: PreTrainedModel) -> list[int]:
    """The tokens at which the model's own generation settings stop."""
    settings = model.generation_config
    own = settings.eos_token_id if settings is not None else None
    return list(own) if isinstance(own, list) else [] if own is None else [own]


def forward_logits(
    model: PreTrainedModel, tokens: Int64[Tensor, "B T"], kept: Int64[Tensor, "n"] | None = None
) -> Float[Tensor, "B n V"]:
    """Logits in these positions, by default all, in the dtype that the model gives them.

    Through its own forward: some families scale or cap them.
    """
    device = device_of(model)
    some = {} if kept is None else {"logits_to_keep": kept.to(device)}
    return model(input_ids=tokens.to(device), use_cache=False, **some).logits


def rows_per_batch(length: int, vocab_size: int, batch_tokens: int) -> int:
    """Rows of `length` tokens that keep a batch below `batch_tokens` and its fp32 logits below 256 MiB; at least 1."""
    return max(1, min(batch_tokens // length, MAX_LOGIT_BYTES // (length * vocab_size * 4)))
