"""One streaming pass over text that says how well a model predicts it, and how close it is to a reference model.

B rows of a batch, T tokens a row, V vocabulary. All logarithms are natural; per-token values are means over the
T - 1 predicted tokens of every row, in fp32 over the full vocabulary, summed in fp64.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from headfuse.errors import CheckpointError, ConfigError
from headfuse.evaluation.inference import forward_logits, measuring, rows_per_batch
from headfuse.precision import Precision
from headfuse.progress import Stages, silent
from headfuse.text.rows import TokenRows

# Positions are taken in chunks whose fp32 logits stay below this: B x T x V never exists whole in fp32.
CHUNK_BYTES = 2**26


@dataclass(frozen=True)
class LossValues:
    """Means over the predicted tokens of some rows; what needs a reference or bytes is None without it."""

    tokens: int
    cross_entropy: float  # nats per token
    bits_per_byte: float | None = None
    reference_cross_entropy: float | None = None
    reference_bits_per_byte: float | None = None
    kl: float | None = None  # KL(reference || model), nats per token
    top1_agreement: float | None = None  # share of positions where both rank the same token first

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy)."""
        return perplexity(self.cross_entropy)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; values that were not measured are left out."""
        values: dict[str, Any] = {"tokens": self.tokens, "cross_entropy": self.cross_entropy}
        values["perplexity"] = self.perplexity
        if self.reference_cross_entropy is not None:
            values["reference_perplexity"] = perplexity(self.reference_cross_entropy)
        names = ("bits_per_byte", "reference_cross_entropy", "reference_bits_per_byte", "kl", "top1_agreement")
        return values | {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class TextLoss:
    """The values of the whole text and, where there are several, of each domain."""

    overall: LossValues
    domains: dict[str, LossValues]
    precision: Precision
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return self.overall.as_dict() | {
            "domains": {name: values.as_dict() for name, values in self.domains.items()},
            "precision": self.precision,
            "tokens_per_second": self.tokens_per_second,
        }


def perplexity(cross_entropy: float) -> float:
    """exp(cross-entropy), clipped to what a double holds."""
    return math.exp(min(cross_entropy, 700.0))


def measure_text_loss(
    model: PreTrainedModel,
    rows: TokenRows,
    *,
    reference: PreTrainedModel | None = None,
    row_bytes: Int64[Tensor, "N"] | None = None,
    precision: Precision = "fp32",
    batch_tokens: int = 8192,
    progress: Stages = silent,
) -> TextLoss:
    """Loss of `model` on `rows`, and its distance from `reference` on the same tokens.

    `row_bytes` (see `count_row_bytes`) adds bits per byte. `batch_tokens` bounds the tokens of a forward pass; the
    logits bound it further. Models run where their parameters are. Raises CheckpointError if logits are not finite,
    ConfigError if the two models have different vocabularies.
    """
    models = [model] if reference is None else [model, reference]
    sizes = [one.config.get_text_config().vocab_size for one in models]
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"wanted a reference with the model's {sizes[0]} tokens, got {sizes[1]}; use the source model"
        )
    size = rows_per_batch(rows.tokens.shape[1], sizes[0], batch_tokens)
    sums, started = [], time.monotonic()
    with measuring(*models, precision=precision), progress("evaluate", rows.num_tokens, "tokens") as advance:
        for batch in rows.tokens.split(size):
            sums.append(batch_sums(batch, *(forward_logits(one, batch) for one in models)))
            advance(batch.numel())
    speed = rows.num_tokens / max(time.monotonic() - started, 1e-9)
    table = torch.cat(sums)
    if not table.isfinite().all():
        raise CheckpointError("wanted finite logits, got NaN or infinity; the weights are broken or overflow, try bf16")
    domains = {}
    if len(rows.domains) > 1:
        for index, name in enumerate(rows.domains):
            domains[name] = _means(table, rows, row_bytes, rows.row_domain == index)
    overall = _means(table, rows, row_bytes, torch.ones(len(table), dtype=torch.bool))
    return TextLoss(overall, domains, precision, speed)


def batch_sums(
    tokens: Int64[Tensor, "B T"], logits: Float[Tensor, "B T V"], reference: Float[Tensor, "B T V"] | None = None
) -> Float64[Tensor, "B n"]:
    """Sums over each row's predicted tokens, on the CPU: cross-entropy; with a reference also its cross-entropy, KL
    and number of agreeing first choices.
    """
    targets = tokens[:, 1:].to(logits.device)
    step = max(1, CHUNK_BYTES // (4 * len(tokens) * logits.shape[-1]))
    total = torch.zeros(len(tokens), 1 if reference is None else 4, dtype=torch.float64, device=logits.device)
    for start in range(0, targets.shape[1], step):
        chunk = slice(start, min(start + step, targets.shape[1]))
        target = targets[:, chunk, None]
        log_p = F.log_softmax(logits[:, chunk].float(), dim=-1)
        values = [-log_p.gather(-1, target)[..., 0]]
        if reference is not None:
            log_q = F.log_softmax(reference[:, chunk].to(log_p.device).float(), dim=-1)
            kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            values += [-log_q.gather(-1, target)[..., 0], kl, log_p.argmax(-1) == log_q.argmax(-1)]
        total += torch.stack([value.double().sum(1) for value in values], dim=1)
    return total.cpu()


def _means(
    table: Float64[Tensor, "N n"], rows: TokenRows, row_bytes: Int64[Tensor, "N"] | None, chosen: Tensor
) -> LossValues:
    sums = table[chosen].sum(0).tolist()
    tokens = int(chosen.sum()) * (rows.tokens.shape[1] - 1)
    text_bytes = 0 if row_bytes is None else int(row_bytes[chosen].sum())

    def bits_per_byte(nats: float) -> float | None:
        return nats / math.log(2) / text_bytes if text_bytes else None

    if len(sums) == 1:
        return LossValues(tokens, sums[0] / tokens, bits_per_byte(sums[0]))
    return LossValues(
        tokens,
        sums[0] / tokens,
        bits_per_byte(sums[0]),
        reference_cross_entropy=sums[1] / tokens,
        reference_bits_per_byte=bits_per_byte(sums[1]),
        kl=max(sums[2] / tokens, 0.0),  # rounding can take it below zero
        top1_agreement=sums[3] / tokens,
    )
