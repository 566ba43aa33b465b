"""A checkpoint folder as transformers objects: configuration, model, tokenizer; never silent about a wrong weight.

transformers fills absent weights with random numbers and says so in its log only; here that is an error.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from headfuse.checkpoints.headers import read_json
from headfuse.checkpoints.quiet import quiet
from headfuse.checkpoints.source import Source
from headfuse.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from headfuse.models.dha.decoupling import DecoupledGeneration  # and the package registers the decoupled classes

# Of the text that models are calibrated and measured on, where nobody says how long.
ROW_LENGTH = 1024
# Any of these means that the folder has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a model was made for; None if its configuration does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def row_length(config: PreTrainedConfig, asked: int | None) -> int:
    """Tokens in a row of text: as many as asked; None: 1024, or the model's positions if those are fewer.

    Raises what `check_length` raises.
    """
    if asked is not None:
        check_length(config, asked)
        return asked
    positions = positions_of(config)
    return ROW_LENGTH if positions is None else min(ROW_LENGTH, positions)


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Raise ConfigError if rows are longer than what a model has positions for."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise ConfigError(
            f"wanted rows of at most the model's {positions} positions, got {length} tokens; choose shorter rows"
        )


def load_config(folder: Path) -> Any:
    """The configuration of a model folder.

    Raises CheckpointError if there is none or it is invalid, UnsupportedArchitectureError if this version of
    transformers does not know the model, the model brings code of its own, or its weights are quantised.
    """
    content = _raw_config(folder)
    kind = content.get("model_type")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises ValueError, KeyError, TypeError and its own kinds
        if "auto_map" in content or "does not recognize this architecture" in str(error):
            raise UnsupportedArchitectureError(
                f"{folder}: wanted a model type that transformers knows, got {kind!r}; use a supported family or a "
                "newer transformers"
            ) from error
        raise CheckpointError(f"{folder / 'config.json'}: {_one_line(error)}; restore the original file") from error
    if quantization := content.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedArchitectureError(
            f"{folder}: wanted plain floating-point weights, got quantised ones ({method}); convert the original "
            "checkpoint and quantise the result"
        )
    return config


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that a model folder's configuration names, in which what is made of it is stored too; fp32 without."""
    dtype = getattr(load_config(folder), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_model(
    source: Source | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The causal language model of a checkpoint: evaluation mode, no gradients, from disk only.

    Attention is sdpa, but for decoupled heads on a CPU: those decode several times faster when nothing repeats them.

    Raises CheckpointError if a weight is missing or has another shape than the configuration says.
    """
    folder, allow_pickle = _folder(source)
    model = _from_pretrained(folder, allow_pickle=allow_pickle, dtype=dtype, attn_implementation="sdpa")
    if isinstance(model, DecoupledGeneration) and torch.device(device).type == "cpu":
        model.set_attn_implementation("headfuse")
    return model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]


def load_tokenizer(source: Source | Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; None if the folder has none. CheckpointError if it cannot be read."""
    folder, _ = _folder(source)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise CheckpointError(f"{folder}: cannot read the tokenizer ({_one_line(error)}); restore its files") from error


def check_weights_fill_model(folder: Path, *, allow_pickle: bool) -> None:
    """Raise CheckpointError unless the stored tensors fill the model of the configuration exactly.

    Runs transformers' own loading on the meta device: its renaming rules apply and no weight takes memory.
    """
    _from_pretrained(folder, allow_pickle=allow_pickle, device_map="meta")


def _from_pretrained(folder: Path, *, allow_pickle: bool, **options: Any) -> PreTrainedModel:
    config = load_config(folder)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {_one_line(error)}") from error
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise CheckpointError(
            f"{folder}: {name}: the configuration promises shape {tuple(wanted)}, the weights have {tuple(stored)}; "
            "fix config.json or the weights"
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors missing, the first is {missing[0]}; the weights are incomplete or "
            "config.json describes another model"
        )
    return model


def _raw_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: wanted a model folder, got {'a file' if folder.exists() else 'nothing'} there"
        )
    if not path.is_file():
        peft = (folder / "adapter_config.json").is_file()
        found = (
            "a PEFT adapter: merge it into its base model" if peft else "none: give the folder of a Hugging Face model"
        )
        raise CheckpointError(f"{folder}: wanted a model folder with config.json, got {found}")
    content = read_json(path)
    if "model_type" not in content:
        raise CheckpointError(f"{path}: wanted a model_type, got none; restore the original file")
    return content


def _folder(source: Source | Path) -> tuple[Path, bool]:
    return (source.folder, source.allow_pickle) if isinstance(source, Source) else (source, False)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
