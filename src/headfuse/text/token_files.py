"""Files of token ids: `.npy` (one stream) and `.npz` (every array a domain)."""

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headfuse.errors import TextError

SUFFIXES = (".npy", ".npz")
Stream = NDArray[np.integer]


def read_streams(path: Path) -> dict[str, Stream]:
    """The token streams of a file by domain, one-dimensional; `.npy` is mapped, not read.

    Raises TextError for a file that is no array, has no integers, or is empty.
    """
    try:
        if path.suffix.lower() == ".npy":
            streams = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                streams = {name: arrays[name] for name in sorted(arrays.files)}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        # NumPy takes whatever it does not know for a pickle, and says how to load that.
        got = "no array of numbers" if "pickle" in str(error) else error
        raise TextError(f"{path}: wanted a NumPy {path.suffix} file, got {got}; save it with numpy.save") from error
    for name, stream in streams.items():
        if stream.dtype.kind not in "ui":
            raise TextError(
                f"{path}: wanted token ids (uint16 or uint32), got dtype {stream.dtype} in {name!r}; convert the array"
            )
    if not any(stream.size for stream in streams.values()):
        raise TextError(f"{path}: wanted token ids, got an empty array; give a file that has tokens")
    return {name: stream.reshape(-1) for name, stream in streams.items()}
