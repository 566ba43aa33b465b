"""The model that a student distils from, when it is another folder than the student's own source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from headfuse.checkpoints.loading import load_config, load_model, load_tokenizer
from headfuse.checkpoints.source import locate
from headfuse.checkpoints.validation import check_weights
from headfuse.errors import ConfigError
from headfuse.precision import Precision
from headfuse.text.tokenizer import agree
from headfuse.training.objectives import check_teacher


@dataclass(frozen=True)
class Teacher:
    """A frozen model in the precision that it computes in, and which one it is."""

    model: PreTrainedModel
    identity: dict[str, Any]


def load_teacher(
    name: str | Path,
    student: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    device: torch.device,
    precision: Precision,
) -> Teacher:
    """Load the teacher of a student with that configuration and tokenizer.

    Raises ConfigError for another vocabulary, another tokenizer, and logits that are scaled or capped; a folder without
    a tokenizer is taken to share the student's.
    """
    source = locate(str(name))
    check_weights(source.folder)
    check_teacher(student, load_config(source.folder))
    theirs = load_tokenizer(source)
    if tokenizer is not None and theirs is not None and not agree(tokenizer, theirs):
        raise ConfigError(
            f"{name}: wanted a teacher with the student's tokenizer, got another one; use a model trained from the "
            "student's original"
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(source, dtype=dtype, device=device)
    return Teacher(model, source.identity_of(model))
