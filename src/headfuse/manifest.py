"""The manifest of an output folder: what was run, on what, with which versions, from which model."""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from headfuse.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn  # at run time nothing here needs it

# Values of every weight that tell one model from another.
SAMPLED_VALUES = 64
PACKAGES = ("headfuse", "torch", "transformers", "safetensors", "numpy")


class Record(BaseModel):
    """Base of what is read back from disk: strict, frozen, no unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Hardware(Record):
    """The machine: processor, cores this process may use, memory in bytes, names of the GPUs."""

    cpu: str
    cores: int
    memory_bytes: int | None
    gpus: tuple[str, ...] = ()


class SourceIdentity(Record):
    """Which model was converted, as far as its folder tells without reading weights: models of one shape look alike.

    `weights_sha256` maps each weight file to the hash of its safetensors header (names, shapes, types, offsets).
    """

    name: str
    revision: str | None = None
    config_sha256: str
    weights_sha256: dict[str, str]


class Manifest(Record):
    """How an output folder came to be; `seconds` by stage, `peak_memory_bytes` of the process and of GPU 0."""

    version: Literal[1] = 1
    command: tuple[str, ...]
    seed: int
    versions: dict[str, str]
    git_commit: str | None
    hardware: Hardware
    source: SourceIdentity
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]

    def save(self, path: Path) -> None:
        """Write the manifest as JSON."""
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """Read a manifest; CheckpointError names the file and the first thing wrong with it."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: wanted a manifest, got {error}; give the folder of a conversion") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise CheckpointError(f"{path}: {where}: {first['msg']}; give the folder of a conversion") from error


def manifest(
    command: list[str],
    *,
    seed: int,
    source: SourceIdentity,
    seconds: Mapping[str, float],
) -> Manifest:
    """The manifest of the work this process has just done; versions, hardware and memory are measured here."""
    return Manifest(
        command=tuple(command),
        seed=seed,
        versions=versions(),
        git_commit=git_commit(),
        hardware=hardware(),
        source=source,
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        peak_memory_bytes=peak_memory(),
    )


def identify(folder: Path, *, name: str, revision: str | None = None) -> SourceIdentity:
    """The identity of a model folder: SHA-256 of its config.json and of the header of every safetensors file."""
    headers = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            headers[file.name] = hashlib.sha256(handle.read(min(length, file.stat().st_size))).hexdigest()
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return SourceIdentity(name=name, revision=revision, config_sha256=config, weights_sha256=headers)


def fingerprint(model: "nn.Module") -> str:
    """A hash of the names, the shapes and a few values of all weights: tells checkpoints of one shape apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED_VALUES)].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Python and the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> Hardware:
    """What this process runs on."""
    import torch

    gpus = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Hardware(cpu=_cpu_model(), cores=_cores(), memory_bytes=_memory_bytes(), gpus=gpus)


def peak_memory() -> dict[str, int]:
    """Most memory that this process has held so far, in bytes: `process`, and `gpu` if one was used."""
    import torch

    peak = {}
    try:
        import resource
    except ImportError:  # not on Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def git_commit(package: Path | None = None) -> str | None:
    """The commit checked out where headfuse runs from; None if it is installed elsewhere.

    Read from the files under `.git`, worktrees included, so that no git program is needed.
    """
    package = package or Path(__file__).resolve().parent
    root = package.parent.parent
    if package.parent.name != "src" or not (root / ".git").exists():
        return None
    git = root / ".git"
    try:
        if git.is_file():
            git = (root / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        common = git / "commondir"
        shared = (git / common.read_text(encoding="utf-8").strip()).resolve() if common.is_file() else git
        return _resolve(shared, head.removeprefix("ref: "))
    except OSError:
        return None


def _resolve(git: Path, reference: str) -> str | None:
    loose, packed = git / reference, git / "packed-refs"
    if loose.is_file():
        return loose.read_text(encoding="utf-8").strip()
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {reference}")), None)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
