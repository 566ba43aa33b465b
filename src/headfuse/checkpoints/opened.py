"""A stock model opened up: its layers, its attention modules and their heads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from headfuse.checkpoints.adapter import Adapter
from headfuse.checkpoints.assembly import attention_module, decoder_layers, split_model
from headfuse.checkpoints.attention import attention_of, attention_replaced
from headfuse.checkpoints.heads import AttentionHeads


@dataclass(frozen=True)
class LoadedModel:
    """A stock model opened up: decoder layers with their attention modules, and the heads of each."""

    model: PreTrainedModel
    adapter: Adapter
    layers: list[tuple[nn.Module, nn.Module]]
    heads: list[AttentionHeads]

    @classmethod
    def of(cls, model: PreTrainedModel, adapter: Adapter) -> "LoadedModel":
        """Open a stock model."""
        blocks = decoder_layers(model, adapter)
        layers = [(block, attention_module(model, adapter, index)) for index, block in enumerate(blocks)]
        return cls(model, adapter, layers, split_model(model, adapter))

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Bytes that the unconverted model's cache holds for one token."""
        return sum(sum(layer.counts) for layer in self.heads) * self.heads[0].head_dim * bytes_per_element

    @contextmanager
    def with_heads(self, heads: Sequence[AttentionHeads]) -> Iterator[PreTrainedModel]:
        """Within the context, the model computes these heads."""
        modules = {index: attention_of(layer, index) for index, layer in enumerate(heads)}
        with attention_replaced(self.layers, modules):
            yield self.model
