"""The folder that a conversion leaves: the model as transformers loads it, and what headfuse has to say about it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from headfuse.checkpoints.assembly import decoupled_config, decoupled_model_state, stock_config, stock_model_state
from headfuse.checkpoints.card import ModelCard
from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.source import Source
from headfuse.checkpoints.write import write_checkpoint
from headfuse.conversion import Converted
from headfuse.folder import OutputFolder
from headfuse.manifest import manifest
from headfuse.models.dha.export import export_code


def write_converted(
    folder: OutputFolder,
    loaded: LoadedModel,
    converted: Converted,
    source: Source,
    *,
    method: str,
    dtype: torch.dtype,
    kv_bytes: tuple[int, int],
) -> None:
    """Weights, configuration, code, tokenizer and card; `kv_bytes` of the cache per token, before and after."""
    state, adapter, stock = loaded.model.state_dict(), loaded.adapter, loaded.model.config
    target = converted.plan.target
    if target == "gqa":
        tensors = stock_model_state(state, adapter, converted.heads)
        config: dict[str, Any] = stock_config(stock, adapter, converted.heads).to_dict()
        config["architectures"] = [type(loaded.model).__name__]
    else:
        tensors = decoupled_model_state(state, adapter, converted.heads)
        config = decoupled_config(stock, adapter, converted.heads).to_dict()
        config |= export_code(adapter.family, folder.root)
    config.pop("_name_or_path", None)  # a path of the machine that converts
    card = ModelCard.for_source(source, method=method, target=target, kv_bytes=kv_bytes)
    write_checkpoint(folder.root, tensors, config, source=source.folder, dtype=dtype, card=card)


def write_records(
    folder: OutputFolder,
    converted: Converted,
    source: Source,
    *,
    parity: Mapping[str, float],
    seconds: Mapping[str, float],
    seed: int,
    command: Sequence[str],
) -> None:
    """Plan, parity and manifest."""
    converted.plan.save(folder.plan)
    folder.parity.write_text(json.dumps(parity, indent=1) + "\n", encoding="utf-8")
    manifest(list(command), seed=seed, source=source.identity(), seconds=seconds).save(folder.manifest)
