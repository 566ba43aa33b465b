"""The model that a conversion starts from: opened up in fp32, with its tokenizer, and which one it is."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from headfuse.checkpoints.loading import load_model, load_tokenizer
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import Source


@dataclass(frozen=True)
class Original:
    """A model to convert. `identity` tells it from other models of its shape, and is JSON-ready."""

    loaded: LoadedModel
    tokenizer: PreTrainedTokenizerBase | None
    identity: dict[str, Any]

    @classmethod
    def of(cls, source: Source, device: torch.device) -> "Original":
        """Load a model. Raises what `load_model`, `adapter_for` and `load_tokenizer` raise."""
        model = load_model(source, dtype=torch.float32, device=device)
        loaded = LoadedModel.of(model, adapter_for(model.config))
        return cls(loaded, load_tokenizer(source), source.identity_of(model))

    @property
    def config(self) -> PreTrainedConfig:
        """The stock configuration."""
        return self.loaded.model.config
