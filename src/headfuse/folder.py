"""The output folder: the names in it, and writing it whole or not at all.

A conversion writes into a hidden sibling, `.OUT.partial-xxxxxxxx`, and one rename makes it OUT. Whatever ends the
work early (an error, Ctrl-C, a full disk) removes the sibling and leaves what stood at OUT as it was. What a killed
process leaves behind is removed by the next one that writes to OUT.
"""

import errno
import glob
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headfuse.claim import abandoned, claimed
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


@dataclass(frozen=True)
class _Partial:
    """What a write keeps beside `out` until it is done; `mark` tells one write from another."""

    out: Path
    mark: str

    @property
    def root(self) -> Path:
        """The folder that is claimed, and that everything else is found by."""
        return self.out.with_name(f".{self.out.name}.partial-{self.mark}")

    @property
    def new(self) -> Path:
        """What will stand at `out`."""
        return self.root / "new"

    @property
    def old(self) -> Path:
        """What stood at `out`, from the first of two renames on. A sibling: to move elsewhere takes more rights."""
        return self.out.with_name(f".{self.out.name}.replaced-{self.mark}")

    def replace(self) -> None:
        """Let the new folder stand at `out`."""
        if self.out.exists():
            self.out.rename(self.old)
        self.new.rename(self.out)

    def remove(self) -> None:
        """Remove it all, the claimed folder last; an old folder that no new one came for is put back."""
        if self.old.exists() and not self.out.exists():
            self.old.rename(self.out)
        for folder in (self.new, self.old, self.root):
            shutil.rmtree(folder, ignore_errors=True)


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
    Warns of what it removes of a killed write to the same `out`.
    Raises ConfigError before any work if `out` is taken (and not `overwrite`), overlaps `source`, cannot be
    created, or has too little disk space; and if the disk fills up while writing.
    """
    out = out.expanduser().resolve()
    _remove_leftovers(out)
    check_output(out, overwrite=overwrite, needed_bytes=needed_bytes, source=source)
    partial = _Partial(out, uuid.uuid4().hex[:8])
    made: list[Path] = []
    try:
        made = make_parents(out)
        (partial.new / "headfuse").mkdir(parents=True)
        with claimed(partial.root):
            yield OutputFolder(partial.new)
            _check_target(out, overwrite=overwrite, source=source)  # again: the work may have taken hours
            _open_to_readers(partial.new)
            partial.replace()
        partial.remove()
    except BaseException as error:
        written = _size(partial.new)
        partial.remove()
        for parent in reversed(made):
            if not any(parent.iterdir()):
                parent.rmdir()
        _explain(error, out, partial.root, written=written, needed=needed_bytes)
        raise


def run_folder_of(out: Path) -> Path:
    """Where a run lives that will end in `out`: beside it, with `.run` behind its name."""
    out = out.expanduser().resolve()
    return out.parent / f"{out.name}.run"


def check_output(out: Path, *, overwrite: bool, needed_bytes: int, source: Path | None) -> None:
    """Raise the ConfigErrors that `writing` would raise before any work; nothing is removed yet."""
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
    if out.exists() and out.samefile(os.curdir):  # it would be replaced under the feet of whoever stands in it
        raise ConfigError(f"{out}: wanted a folder to create, got the current one; choose a folder inside it")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out}: exists and is not empty; choose another output or pass --overwrite")
    if not (out / "config.json").is_file() and not (out / "headfuse").is_dir():
        raise ConfigError(f"{out}: --overwrite replaces models only, this folder holds none; choose another output")


def _check_space(out: Path, needed_bytes: int) -> None:
    if not needed_bytes:
        return
    place = _nearest(out.parent)
    disk, needed = shutil.disk_usage(place), needed_bytes + SPARE_BYTES
    if not disk.total:
        raise ConfigError(f"{out}: cannot be written ({place} is on no disk); choose an output you may write to")
    free = disk.free + sum(_size(leftover.root) for leftover in _leftovers(out))
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


def _leftovers(out: Path) -> list[_Partial]:
    """What processes of this host that are gone left beside `out`."""
    found = out.parent.glob(f".{glob.escape(out.name)}.partial-{'[0-9a-f]' * 8}")
    return [_Partial(out, path.name[-8:]) for path in found if abandoned(path)]


def _remove_leftovers(out: Path) -> None:
    for leftover in _leftovers(out):
        size = _size(leftover.root)
        leftover.remove()
        warnings.warn(
            f"{out}: removed {leftover.root.name} ({size / 1e9:.2f} GB), which a killed process left behind",
            stacklevel=4,
        )


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
