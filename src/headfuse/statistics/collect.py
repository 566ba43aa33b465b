"""The one pass over calibration text, and its result on disk for the next budget."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headfuse.checkpoints.heads import AttentionHeads
from headfuse.errors import ConfigError
from headfuse.precision import Precision
from headfuse.progress import Advance, ignore
from headfuse.statistics.moments import LayerStatistics
from headfuse.statistics.stream import LayerInputs, stream_layers

ROWS_PER_GRAM = 8192  # tokens per partial product


def collect(
    model: nn.Module,
    layers: list[tuple[nn.Module, nn.Module]],
    heads: Sequence[AttentionHeads],
    rows: Int[Tensor, "N T"],
    *,
    unit_rows: bool = False,
    precision: Precision = "fp32",
    advance: Advance = ignore,
) -> list[LayerStatistics]:
    """Every layer's second moments over `rows`, fp64, on the CPU; `unit_rows` adds those of unit-length rows."""
    stream = stream_layers(model, layers, rows, precision=precision, advance=advance)
    return [layer_statistics(inputs, heads[inputs.layer], unit_rows=unit_rows) for inputs in stream]


def layer_statistics(inputs: LayerInputs, heads: AttentionHeads, *, unit_rows: bool) -> LayerStatistics:
    """Second moments of one layer's attention input and, on demand, of its unit-length key and value rows."""
    x = inputs.hidden.flatten(0, 1)
    total = _Sums()
    for chunk in x.split(ROWS_PER_GRAM):
        extended_input = torch.cat([chunk, chunk.new_ones(len(chunk), 1)], dim=1).double()
        total.add("moment", extended_input.mT @ extended_input)
        if unit_rows:
            _add_unit_grams(total, chunk.float(), heads)
    return LayerStatistics(**{name: (gram / len(x)).cpu() for name, gram in total.grams.items()})


def _add_unit_grams(total: "_Sums", x: Float[Tensor, "N D"], heads: AttentionHeads) -> None:
    half = heads.traits.rotary_dim // 2
    key, value = _unit_rows(x, heads.k, heads.k_bias), _unit_rows(x, heads.v, heads.v_bias)
    rest = key[..., 2 * half :]
    for name, rows in (("unit_values", value), ("unit_key_rest", rest)):
        gram = rows.flatten(1).mT @ rows.flatten(1)
        total.add(name, gram.view(*rows.shape[1:], *rows.shape[1:]))
    key_planes = torch.complex(key[..., :half], key[..., half : 2 * half]).permute(2, 1, 0)  # F, K, tokens
    total.add("unit_key_planes", key_planes @ key_planes.mH)


class _Sums:
    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}

    def add(self, name: str, gram: Tensor) -> None:
        self.grams[name] = gram if name not in self.grams else self.grams[name] + gram


def _unit_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Float[Tensor, "N n d"]:
    """Per token, every head's key or value scaled to length one (zero rows stay zero)."""
    rows = (x @ weight.float().flatten(0, 1).mT).unflatten(1, weight.shape[:2]).double()
    rows = rows if bias is None else rows + bias
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-30)


def memory_needed(heads: AttentionHeads, num_layers: int, *, unit_rows: bool = False) -> int:
    """Bytes that the statistics of a whole model occupy, on disk as in memory."""
    elements = (heads.hidden_size + 1) ** 2
    if unit_rows:
        rest = heads.head_dim - heads.traits.rotary_dim
        elements += (heads.num_value_heads * heads.head_dim) ** 2 + (heads.num_key_heads * rest) ** 2
        elements += heads.traits.rotary_dim * heads.num_key_heads**2
    return 8 * num_layers * elements


def save_statistics(folder: Path, statistics: Sequence[LayerStatistics], identity: dict) -> None:
    """Write statistics with the identity (model, text, precision) that they belong to; ConfigError if it cannot."""
    tensors = {}
    for layer, entry in enumerate(statistics):
        for name, gram in vars(entry).items():
            if gram is None:
                continue
            stored = torch.view_as_real(gram) if gram.is_complex() else gram
            tensors[f"{layer}.{name}"] = stored.contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _replacing(folder / "statistics.safetensors") as partial:
            save_file(tensors, partial)
        with _replacing(folder / "statistics.json") as partial:  # the last: what a reader looks for
            partial.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: statistics cannot be written ({error}); give another --statistics folder") from (
            error
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` once it is whole."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_statistics(folder: Path, identity: dict) -> list[LayerStatistics] | None:
    """Statistics saved for exactly this identity; None if the folder has none yet.

    Raises ConfigError if the folder holds the statistics of another model or another text.
    """
    if not (folder / "statistics.json").is_file():
        return None
    try:
        found = json.loads((folder / "statistics.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "statistics.safetensors")
        if not isinstance(found, dict):
            raise ValueError("wanted an object")
    except (ValueError, OSError, SafetensorError) as error:
        raise ConfigError(f"{folder}: wanted saved statistics, got unreadable files; delete the folder") from error
    differing = sorted(key for key in identity | found if identity.get(key) != found.get(key))
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{folder}: its statistics are of another {key}: wanted {identity.get(key)!r}, got {found.get(key)!r}; "
            "give another --statistics folder"
        )
    count = 1 + max(int(name.split(".")[0]) for name in tensors)
    return [_layer(tensors, layer) for layer in range(count)]


def _layer(tensors: dict[str, Tensor], layer: int) -> LayerStatistics:
    found = {name.split(".", 1)[1]: gram for name, gram in tensors.items() if name.startswith(f"{layer}.")}
    if "unit_key_planes" in found:
        found["unit_key_planes"] = torch.view_as_complex(found["unit_key_planes"])
    return LayerStatistics(**found)
