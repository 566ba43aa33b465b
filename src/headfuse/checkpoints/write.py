"""Writing a model folder: weights, configuration, and what must come along from the source."""

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedConfig

from headfuse.checkpoints.card import ModelCard
from headfuse.checkpoints.headers import OUTPUT_EMBEDDINGS

# Everything of the source but its weights, configuration, code and card. Names are those that transformers reads.
COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICEN[SC]E*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Tensor],
    config: PreTrainedConfig | Mapping[str, Any],
    *,
    source: Path,
    dtype: torch.dtype,
    max_shard_size: str = "5GB",
    card: ModelCard | None = None,
) -> None:
    """Write a folder that transformers loads: safetensors shards and index, config.json, tokenizer, licence, card.

    `state` holds the model's own names; floating-point tensors are stored as `dtype`, tensors that share memory
    (tied embeddings) once. The rest is copied from the model folder `source`. `folder` must exist: use `writing`.
    Equal tensors make equal files.
    """
    # A name left out there is noted in the files' headers, in no fixed order.
    tensors = _once(_stored(state, dtype))
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
    _write_config(folder / "config.json", config, dtype)
    copy_companions(source, folder)
    if card is not None:
        card.save(folder / "README.md")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, chat templates, generation settings and licence of a model folder."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)  # not the permissions, which may be read-only
    if (templates := source / "additional_chat_templates").is_dir():
        shutil.copytree(templates, folder / templates.name, copy_function=shutil.copyfile, dirs_exist_ok=True)


def _stored(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as they are stored: cast, contiguous, with a storage of their own, shared ones still shared."""
    done: dict[tuple[Any, ...], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = _identity(tensor)
        if key not in done:
            cast = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            # A view would drag its whole storage along.
            whole = cast.untyped_storage().nbytes() == cast.numel() * cast.element_size()
            done[key] = cast if whole else cast.clone()
        result[name] = done[key]
    return result


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without output embeddings that are another tensor."""
    others = {id(tensor) for name, tensor in tensors.items() if name not in OUTPUT_EMBEDDINGS}
    return {name: each for name, each in tensors.items() if name not in OUTPUT_EMBEDDINGS or id(each) not in others}


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in the same memory."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _write_config(path: Path, config: PreTrainedConfig | Mapping[str, Any], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if isinstance(config, PreTrainedConfig):
        config = deepcopy(config)
        config.dtype = name
        # Not save_pretrained: it refuses old configurations that hold generation settings.
        text = config.to_json_string()
    else:
        content = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")
