"""What training minimises: next-token cross-entropy, or the distance from a teacher's next-token distribution.

The decoder runs once; the output projection and the loss run over chunks of its B * T positions (`chunked_loss`). n is
the positions of a chunk, D the hidden size, V the vocabulary. Losses are in nats, mean per predicted token, in fp32
whatever the precision of the matrix products.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface

from headfuse.errors import ConfigError
from headfuse.training.chunked_loss import OutputLayer, mean_over_chunks, project

# The name under which transformers knows attention without a mask.
WHOLE_ROWS = "headfuse_whole_rows"
# Settings of families whose logits are more than the output layer applied to the last hidden states.
RESCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Losses:
    """What is minimised, and by name the detached scalars that are logged."""

    total: Float32[Tensor, ""]
    logged: dict[str, Tensor]


class Objective(Protocol):
    """What is minimised: a function of a model and of rows of T + 1 tokens, of which the last T are predicted.

    Tokens are what `TrainingRows` of batches gives: plain ids, or with more that belongs to them.
    """

    def __call__(self, model: PreTrainedModel, tokens: Int64[Tensor, "B ... T+1"]) -> Losses:
        """The losses on a batch, of which `total` has gradients."""
        ...


@contextmanager
def whole_rows(config: PreTrainedConfig) -> Iterator[None]:
    """Within the context, a model that attends by SDPA takes every row for one text without padding.

    Otherwise transformers looks for padding and for packed texts in every batch: that waits for the device, and where
    it cannot wait (in a CUDA graph) it builds a mask, which rules the fastest kernels out.
    """
    usual = config._attn_implementation
    if usual == "sdpa":
        config._attn_implementation = WHOLE_ROWS
    try:
        yield
    finally:
        config._attn_implementation = usual


AttentionInterface.register(WHOLE_ROWS, sdpa_attention_forward)
AttentionMaskInterface.register(WHOLE_ROWS, lambda *_, **__: None)


def last_hidden(
    model: PreTrainedModel, tokens: Int64[Tensor, "B T+1"], positions: Int64[Tensor, "B T+1"] | None = None
) -> tuple[Float[Tensor, "B*T D"], OutputLayer]:
    """The decoder's output at every position that predicts a token, and the layer that makes logits of it.

    Rows are one text each, or with `positions` several, of which each starts at position 0 and sees no other.
    """
    if positions is None:
        with whole_rows(model.config):
            hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    else:
        read = positions[:, :-1]
        # Not every family looks for packed texts itself (OPT does not), and looking waits for the device.
        mask = mask_of_texts(read, additive=model.config._attn_implementation == "eager")
        inputs = {"input_ids": tokens[:, :-1], "position_ids": read, "attention_mask": mask}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else layer.weight.dtype
    return hidden.flatten(0, 1), OutputLayer(layer.weight, layer.bias, dtype)


def mask_of_texts(positions: Int64[Tensor, "B T"], *, additive: bool) -> Tensor:
    """What each position sees, itself and what stands before it in its text: `[B, 1, T, T]`.

    True where it sees, or, `additive` to the scores as transformers' eager attention wants it, 0 there and the lowest
    number elsewhere.
    """
    text = (positions == 0).cumsum(-1)
    sees = (text[:, :, None] == text[:, None]).tril()[:, None]
    return (
        torch.zeros_like(sees, dtype=torch.float32).masked_fill(~sees, torch.finfo(torch.float32).min)
        if additive
        else sees
    )


def language_sums(
    targets: Int64[Tensor, "n"], hidden: Float[Tensor, "n D"], layer: OutputLayer
) -> Float32[Tensor, "1"]:
    """The cross-entropy of a chunk, summed over its positions."""
    return F.cross_entropy(project(hidden, layer), targets, reduction="sum")[None]


def distillation_sums(
    targets: Int64[Tensor, "n"],
    teacher_hidden: Float[Tensor, "n E"],
    hidden: Float[Tensor, "n D"],
    layer: OutputLayer,
    teacher_layer: OutputLayer,
    learns_text: bool,
) -> Float32[Tensor, "2"]:
    """Cross-entropy and KL(teacher || student) of a chunk over the full vocabulary, summed over its positions.

    Unless it `learns_text`, the cross-entropy has no gradient: one V-wide tensor less.
    """
    log_p = F.log_softmax(project(hidden, layer), dim=-1)
    with torch.no_grad():
        log_teacher = F.log_softmax(project(teacher_hidden, teacher_layer), dim=-1)
    kl = F.kl_div(log_p, log_teacher, reduction="sum", log_target=True)
    lm = F.nll_loss(log_p if learns_text else log_p.detach(), targets, reduction="sum")
    return torch.stack([lm, kl])


@dataclass(frozen=True)
class LanguageModelling:
    """Mean next-token cross-entropy.

    A chunk has `chunk_tokens` positions, by default what makes its fp32 logits 256 MiB. `sums` is the function of one
    chunk: give `torch.compile(language_sums)` to have it compiled.
    """

    _: KW_ONLY
    chunk_tokens: int | None = None
    sums: Callable[..., Tensor] = language_sums

    def __call__(self, model: PreTrainedModel, tokens: Int64[Tensor, "B T+1"]) -> Losses:
        """The loss on a batch."""
        hidden, layer = last_hidden(model, tokens)
        positions = (tokens[:, 1:].flatten(),)
        found = mean_over_chunks(self.sums, positions, hidden, layer, shares=(1.0,), chunk_tokens=self.chunk_tokens)
        return Losses(found.total, {"lm": found.parts[0]})


@dataclass(frozen=True)
class Distillation:
    """Forward KL from the teacher's distribution over the full vocabulary (arXiv 1503.02531, at temperature 1).

    The loss is `lm_weight * lm + (1 - lm_weight) * kl`, where lm is the cross-entropy. The teacher lives on the
    student's device and computes at the student's precision, without gradients. `chunk_tokens` and `sums` (default
    `distillation_sums`) are as in `LanguageModelling`.
    """

    teacher: PreTrainedModel
    _: KW_ONLY
    lm_weight: float = 0.0
    chunk_tokens: int | None = None
    sums: Callable[..., Tensor] = distillation_sums

    def __post_init__(self) -> None:
        """Refuse a weight that is none."""
        check_lm_weight(self.lm_weight)

    def __call__(self, model: PreTrainedModel, tokens: Int64[Tensor, "B T+1"]) -> Losses:
        """The loss on a batch."""
        with torch.no_grad():
            teacher_hidden, teacher_layer = last_hidden(self.teacher, tokens)
        hidden, layer = last_hidden(model, tokens)
        found = mean_over_chunks(
            self.sums,
            (tokens[:, 1:].flatten(), teacher_hidden),
            hidden,
            layer,
            teacher_layer,
            self.lm_weight > 0,
            shares=(self.lm_weight, 1 - self.lm_weight),
            chunk_tokens=self.chunk_tokens,
        )
        lm, kl = found.parts
        return Losses(found.total, {"lm": lm, "kl": kl})


def objective(teacher: PreTrainedModel | None, lm_weight: float, *, compiled: bool = False) -> Objective:
    """Distillation with that share of language-model loss; that loss alone without a teacher, or at a share of 1.

    Raises ConfigError for a share outside 0 to 1.
    """
    check_lm_weight(lm_weight)
    compiling = partial(torch.compile, dynamic=False) if compiled else (lambda sums: sums)
    if teacher is None or lm_weight == 1:
        return LanguageModelling(sums=compiling(language_sums))
    return Distillation(teacher, lm_weight=lm_weight, sums=compiling(distillation_sums))


def check_lm_weight(lm_weight: float) -> None:
    """Raise ConfigError unless the weight is a share."""
    if not 0 <= lm_weight <= 1:
        raise ConfigError(f"wanted an lm_weight from 0 to 1, got {lm_weight}; choose a share of the loss")


def check_teacher(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Raise ConfigError if the vocabularies differ, or if logits are scaled or capped behind the output layer."""
    sizes = [config.get_text_config().vocab_size for config in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"wanted a teacher with the student's {sizes[0]} tokens, got {sizes[1]}; use the model that the student "
            "was converted from"
        )
    for config in (student.get_text_config(), teacher.get_text_config()):
        for name in RESCALED_LOGITS:
            if getattr(config, name, None) not in (None, 1):
                raise ConfigError(
                    f"wanted logits straight from the output layer, got {name}={getattr(config, name)} in a "
                    f"{config.model_type} model; use another teacher"
                )
