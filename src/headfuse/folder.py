"""The output folder: the names in it, and writing it whole or not at all.

A conversion writes into a hidden sibling, `.OUT.partial-xxxx`, and one rename makes it OUT. Whatever ends the
work early (an error, Ctrl-C, a full disk) removes the sibling and leaves what stood at OUT as it was.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headfuse.errors import ConfigError

# Metadata, a model card and the block size of the file system come on top of the weights.
SPARE_BYTES = 16 << 20


@dataclass(frozen=True)
class OutputFolder:
    """An ordinary Hugging Face folder, with what headfuse has to say about it under `headfuse/`."""

    root: Path

    @property
    def config(self) -> Path:
        """The model's configuration."""
        return self.root / "config.json"

    @property
    def model_card(self) -> Path:
        """What the model is, for people."""
        return self.root / "README.md"

    @property
    def records(self) -> Path:
        """The folder of everything below."""
        return self.root / "headfuse"

    @property
    def manifest(self) -> Path:
        """How the folder was made: command, versions, hardware, source."""
        return self.records / "manifest.json"

    @property
    def plan(self) -> Path:
        """The head plan."""
        return self.records / "plan.json"

    @property
    def parity(self) -> Path:
        """The exactness checks and their outcome."""
        return self.records / "parity.json"

    def metrics(self, stage: str) -> Path:
        """The training curve of a stage, one JSON line a step."""
        return self.records / f"{stage}.jsonl"

    @property
    def evaluation(self) -> Path:
        """The folder of evaluation results, one JSON each."""
        return self.records / "eval"


@contextmanager
def writing(
    out: Path,
    *,
    overwrite: bool = False,
    needed_bytes: int = 0,
    source: Path | None = None,
) -> Iterator[OutputFolder]:
    """Within the context, a temporary folder to write into; it becomes `out` if the context ends without exception.

    `needed_bytes` is an estimate of what will be written, `source` the model folder that must not be written to.
    Raises ConfigError before any work if `out` is taken (and not `overwrite`), overlaps `source`, cannot be
    created, or has too little disk space; and if the disk fills up while writing.
    """
    out = out.expanduser().resolve()
    check_output(out, overwrite=overwrite, needed_bytes=needed_bytes, source=source)
    mark = uuid.uuid4().hex[:8]
    partial = out.with_name(f".{out.name}.partial-{mark}")
    made: list[Path] = []
    try:
        made = make_parents(out)
        (partial / "headfuse").mkdir(parents=True)
        yield OutputFolder(partial)
        _check_target(out, overwrite=overwrite, source=source)  # again: the work may have taken hours
        _open_to_readers(partial)
        _replace(partial, out, aside=out.with_name(f".{out.name}.replaced-{mark}"))
    except BaseException as error:
        written = _size(partial)
        shutil.rmtree(partial, ignore_errors=True)
        for parent in reversed(made):
            if not any(parent.iterdir()):
                parent.rmdir()
        _explain(error, out, partial, written=written, needed=needed_bytes)
        raise


def check_output(out: Path, *, overwrite: bool, needed_bytes: int, source: Path | None) -> None:
    """Raise the ConfigErrors that `writing` would raise before any work."""
    out = out.expanduser().resolve()
    _check_target(out, overwrite=overwrite, source=source)
    _check_space(out, needed_bytes)


def _check_target(out: Path, *, overwrite: bool, source: Path | None) -> None:
    if source is not None:
        model = source.expanduser().resolve()
        if out == model or model in out.parents or out in model.parents:
            raise ConfigError(
                f"{out}: the output and the model {model} must be separate folders; choose another output"
            )
    if not (place := _nearest(out)).is_dir():
        raise ConfigError(f"{out}: wanted a folder to create, {place} is a file; choose another output")
    if os.path.ismount(out):
        raise ConfigError(f"{out}: wanted a folder to create, got a mount point; choose a folder inside it")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: exists and is not empty; choose another output or pass --overwrite")
    if not (out / "config.json").is_file() and not (out / "headfuse").is_dir():
        raise ConfigError(f"{out}: --overwrite replaces models only, this folder holds none; choose another output")


def _check_space(out: Path, needed_bytes: int) -> None:
    if not needed_bytes:
        return
    free, needed = shutil.disk_usage(_nearest(out.parent)).free, needed_bytes + SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"{out}: wanted {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; free some space or choose an "
            "output on another disk"
        )


def _nearest(path: Path) -> Path:
    """The path, or the first of its parents that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def make_parents(out: Path) -> list[Path]:
    """Create the parents of `out`; returns those that were not there, outermost first."""
    absent = [parent for parent in out.parents if not parent.exists()][::-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    return absent


def _replace(partial: Path, out: Path, *, aside: Path) -> None:
    """Rename `partial` to `out`; an old `out` is moved aside first, put back on failure, and deleted last."""
    replaced = out.exists()
    if replaced:
        out.rename(aside)
    try:
        partial.rename(out)
    except BaseException:
        if replaced:
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _open_to_readers(folder: Path) -> None:
    """Give files the permissions that the umask grants: safetensors leaves its files readable by their owner only."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _explain(error: BaseException, out: Path, partial: Path, *, written: int, needed: int) -> None:
    """Raise the ConfigError that says in one line what a failed write means; return if it means nothing to a user."""
    # safetensors and torch report a full disk in errors of their own, with the system's words inside.
    full = isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}
    if full or (isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error)):
        wanted = f"about {needed / 1e9:.2f} GB" if needed else "more space"
        raise ConfigError(
            f"{out}: the disk is full: wanted {wanted}, got room for {written / 1e9:.2f} GB; nothing was left behind: "
            "free some space or choose an output on another disk"
        ) from error
    ours = (
        isinstance(error, OSError) and isinstance(error.filename, str) and _concerns(Path(error.filename), out, partial)
    )
    if isinstance(error, OSError) and ours and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); choose an output you may write to") from error


def _concerns(path: Path, out: Path, partial: Path) -> bool:
    return path in {out, partial, *out.parents} or partial in path.parents


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
