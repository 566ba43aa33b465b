"""What a checkpoint folder holds, read from the headers of its weight files without loading a weight.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, then the data. Everything that can
be wrong before the data is reported here: missing shards, cut-off downloads, Git LFS pointers, stray names.
"""

import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headfuse.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Buffers that old checkpoints store beside the weights; transformers recomputes them, and some hold -inf by design.
BUFFERS = (".masked_bias", ".attn.bias", ".attention.bias", "rotary_emb.inv_freq")
# Where they are the input embedding, transformers looks for the latter; some files have both.
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor: shape, type, size in bytes, and the file that holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    file: Path


Headers = Mapping[str, TensorHeader]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CheckpointError if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: wanted JSON, got {error}; restore the file from the original model") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: wanted a JSON object, got {type(value).__name__}; restore the original file")
    return value


def is_buffer(name: str) -> bool:
    """Whether the tensor is a stored buffer that loading ignores."""
    return name.endswith(BUFFERS)


def read_headers(folder: Path, *, allow_pickle: bool = False) -> dict[str, TensorHeader]:
    """Every tensor of the checkpoint by name, with the structure of each weight file checked.

    Reads the safetensors headers only. Pickles (with `allow_pickle`) have no header and are mapped into memory.
    Raises CheckpointError for absent, truncated or corrupt files and for an index that the shards contradict.
    """
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / SINGLE_FILE).is_file():
        return _file_headers(folder / SINGLE_FILE)
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles and not allow_pickle:
        raise CheckpointError(
            f"{folder}: wanted {SINGLE_FILE}, got only the pickle {pickles[0]}, which can run code when loaded; "
            "if you trust its author pass --allow-pickle"
        )
    if pickles:
        return {
            name: TensorHeader(tuple(tensor.shape), tensor.dtype, tensor.nbytes, file)
            for file in pickle_files(folder)
            for name, tensor in open_pickle(file).items()
        }
    raise CheckpointError(
        f"{folder}: wanted {SINGLE_FILE} or {INDEX}, got neither; download the weights into the folder "
        "(weights published only as pickles need --allow-pickle)"
    )


def stream_tensors(headers: Headers) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor, one in memory at a time, file by file."""
    by_file: dict[Path, list[str]] = {}
    for name, header in headers.items():
        by_file.setdefault(header.file, []).append(name)
    for file, names in by_file.items():
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(name)
        else:
            tensors = open_pickle(file)
            yield from ((name, tensors[name]) for name in names)


def header_bytes(file: Path) -> bytes:
    """The JSON header of a safetensors file, with the file's length checked against it."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{file}: wanted weights, got a Git LFS pointer; run `git lfs pull` in its repository"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(
                f"{file}: wanted a safetensors header of {length} bytes, the file has {size}; it is truncated or not "
                "safetensors: download it again"
            )
        return handle.read(length)


def pickle_files(folder: Path) -> list[Path]:
    """The pickled weight files of a folder: the shards of the index, or the single file."""
    single, index = (folder / name for name in PICKLES)
    if single.is_file():
        return [single]
    return _shards(folder, read_json(index), index)


def open_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, mapped from disk and unpickled without running code; CheckpointError otherwise."""
    zipped = zipfile.is_zipfile(file)  # files from before torch 1.6 are not, and cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch on its own legacy formats
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file}: wanted a pickle of tensors only, got: {reason[:160]}; convert it to safetensors first"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file}: wanted a dictionary of tensors, got something else; convert it to safetensors")
    return tensors


def _sharded(folder: Path) -> dict[str, TensorHeader]:
    index = folder / INDEX
    content = read_json(index)
    headers: dict[str, TensorHeader] = {}
    for shard in _shards(folder, content, index):
        headers |= _file_headers(shard)
    for name, shard in content["weight_map"].items():
        if name not in headers or headers[name].file.name != shard:
            raise CheckpointError(
                f"{index}: wanted tensor {name!r} in {shard}, it is not there; the index belongs to other weights: "
                "download the folder again"
            )
    return headers


def _shards(folder: Path, content: dict[str, Any], index: Path) -> list[Path]:
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{index}: wanted a weight_map from tensor to file, got none; restore the original file")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(
                f"{index}: wanted a file name beside the index, got {name!r}; do not trust this folder"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: wanted {len(names)} weight files, {len(missing)} missing, the first is {missing[0]}; "
            "finish the download"
        )
    return [folder / name for name in names]


def _file_headers(file: Path) -> dict[str, TensorHeader]:
    raw = header_bytes(file)
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        wanted = 8 + len(raw) + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{file}: the safetensors header is corrupt ({error}); download it again") from error
    if (size := file.stat().st_size) < wanted:
        raise CheckpointError(f"{file}: wanted {wanted} bytes, got {size}; the file is truncated: download it again")
    try:
        with safe_open(file, framework="pt"):
            return {name: _tensor_header(entry, file) for name, entry in entries.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors ({error}); download it again") from error


def _tensor_header(entry: dict[str, Any], file: Path) -> TensorHeader:
    start, end = entry["data_offsets"]
    return TensorHeader(tuple(entry["shape"]), DTYPES[entry["dtype"]], end - start, file)
