"""A whole model around converted heads: the state and the configuration of the checkpoint to write.

`state` is a stock model's full `state_dict()`; one `AttentionHeads` a layer replaces its attention tensors.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from headfuse.checkpoints.adapter import Adapter, decoupled_tensors
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.errors import PlanError


def decoder_layers(model: PreTrainedModel, adapter: Adapter) -> nn.ModuleList:
    """The blocks of a model, stock or decoupled."""
    layers = model.get_submodule(adapter.decoder)
    assert isinstance(layers, nn.ModuleList)
    return layers


def attention_module(model: PreTrainedModel, adapter: Adapter, layer: int) -> nn.Module:
    """The attention module of a layer."""
    return model.get_submodule(adapter.attention.format(layer=layer))


def attention_tensors(state: Mapping[str, Tensor], adapter: Adapter, layer: int) -> dict[str, Tensor]:
    """The tensors of a layer's attention module, under the names that `adapter.split` wants."""
    prefix = adapter.attention.format(layer=layer) + "."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def split_model(model: PreTrainedModel, adapter: Adapter) -> list[AttentionHeads]:
    """The heads of every layer of a stock model, sharing memory with it."""
    count = len(decoder_layers(model, adapter))
    modules = (attention_module(model, adapter, layer) for layer in range(count))
    return [adapter.split(module.state_dict(), model.config, layer) for layer, module in enumerate(modules)]


def stock_model_state(
    state: Mapping[str, Tensor], adapter: Adapter, heads: Sequence[AttentionHeads]
) -> dict[str, Tensor]:
    """`state` with the attention of every layer joined from `heads`, for `stock_config`; PlanError if not plain GQA."""
    return _replaced(state, adapter, [adapter.join(layer) for layer in heads])


def decoupled_model_state(
    state: Mapping[str, Tensor], adapter: Adapter, heads: Sequence[AttentionHeads]
) -> dict[str, Tensor]:
    """`state` for the decoupled class: each attention module's own tensors give way to separate projections."""
    return _replaced(state, adapter, [decoupled_tensors(layer) for layer in heads])


def stock_config(config: PreTrainedConfig, adapter: Adapter, heads: Sequence[AttentionHeads]) -> PreTrainedConfig:
    """`config` with the number of key/value heads that `heads` have; PlanError if it differs by layer."""
    counts = {n for layer in heads for n in layer.counts}
    if len(counts) != 1:
        raise PlanError(
            f"{adapter.family}: wanted one number of key/value heads in all layers for a stock checkpoint, got "
            f"{sorted(counts)}; use --target dha"
        )
    grouped = deepcopy(config)
    if adapter.stock_gqa:
        grouped.num_key_value_heads = counts.pop()
    return grouped


def decoupled_config(config: PreTrainedConfig, adapter: Adapter, heads: Sequence[AttentionHeads]) -> PreTrainedConfig:
    """The `Dha<Family>Config` of these heads.

    Where the family has it, num_key_value_heads is the largest count of any layer: an upper bound for tools that
    read nothing else.
    """
    fields: dict[str, Any] = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version"):
        fields.pop(name, None)
    fields["key_map"] = [list(layer.key_map) for layer in heads]
    fields["value_map"] = [list(layer.value_map) for layer in heads]
    if "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = max(max(layer.counts) for layer in heads)
    return adapter.decoupled_config_class(**fields)


def _replaced(
    state: Mapping[str, Tensor], adapter: Adapter, modules: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    prefixes = [adapter.attention.format(layer=layer) + "." for layer in range(len(modules))]
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(prefixes))}
    for prefix, tensors in zip(prefixes, modules, strict=True):
        kept |= {prefix + name: _owned(tensor) for name, tensor in tensors.items()}
    return kept


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous tensor with a storage of its own, as safetensors wants; a copy only where it must be."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
