"""Whose a temporary folder is, and whether they still live: a locked file in it, which also says where they run.

The kernel drops the lock when its process ends, however it ends. A lock is believed only where it was taken, since
network disks may keep locks, as they do process numbers, from other hosts. After a restart of the host nothing is
believed either: other machines may have its name.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CLAIM = "owner"
BOOT = Path("/proc/sys/kernel/random/boot_id")  # of the kernel, so that containers on it share it


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Within the context, `folder` is this process's. The claim stays behind: without a lock it says who is gone."""
    draft = folder / f"{CLAIM}.draft"
    with draft.open("w", encoding="utf-8") as file:
        file.write(_here())
        file.flush()
        if _locked(file):
            draft.rename(folder / CLAIM)  # only now: nobody must see a claim without its lock
        yield


def abandoned(folder: Path) -> bool:
    """Whether a process on this host claimed `folder` and is gone.

    False where that cannot be told: without a claim, with one of another host, where files cannot be locked.
    """
    return _lock_of(folder) is True


def occupied(folder: Path) -> bool:
    """Whether a process on this host claimed `folder` and lives. False where that cannot be told, as above."""
    return _lock_of(folder) is False


def _lock_of(folder: Path) -> bool | None:
    """Whether the lock of a claim on this host is free; None where that cannot be told."""
    try:
        with (folder / CLAIM).open("r+", encoding="utf-8") as file:  # network disks lock only what may be written
            return _locked(file) if file.read() == _here() else None
    except OSError:
        return None


def _here() -> str:
    """The host, and which of its starts."""
    return f"{platform.node()}\n{BOOT.read_text(encoding='utf-8') if BOOT.is_file() else ''}"


def _locked(file: IO[str]) -> bool:
    """Lock an open file until it is closed; False if another process has, or none can."""
    try:
        import fcntl  # not on Windows

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
