"""The teacher's k likeliest tokens at every position, on disk: for a teacher that does not fit beside the student.

Entries are found by a hash of a row's tokens. So the order of the rows, the number of processes and the size of
micro-batches do not matter, and a row that comes again is stored once. n is the positions of a chunk.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int, Int64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from headfuse.errors import ConfigError
from headfuse.manifest import fingerprint
from headfuse.precision import Precision, precision_context
from headfuse.progress import Stages, silent
from headfuse.training.batches import Batches
from headfuse.training.chunked_loss import CHUNK_BYTES, OutputLayer, mean_over_chunks, project
from headfuse.training.objectives import Losses, check_lm_weight, last_hidden
from headfuse.training.processes import Processes

DESCRIPTION = "teacher.json"
KEY_BYTES = 16


def top_k_teacher(
    teacher: PreTrainedModel,
    batches: Batches,
    folder: Path,
    here: Processes,
    *,
    k: int = 64,
    dtype: torch.dtype = torch.float16,
    micro_rows: int | None = None,
    stages: Stages = silent,
) -> None:
    """Write what `TopKDistillation` reads for every row of `batches`: one file a step, each whole or not at all.

    A file holds for its rows `[rows, T, k]` token ids (int32) and log-probabilities (`dtype`), and `[rows, T]` the
    log of the mass that is left over (fp32). A pass that was stopped goes on where it was, and one over more text adds
    to the folder. The teacher runs where it is, `micro_rows` at a time (None: all rows of a step). Processes share the
    steps; wait for all of them before reading.

    Raises ConfigError if k exceeds the vocabulary, or the folder holds another teacher's entries.
    """
    layer = teacher.get_output_embeddings()
    assert isinstance(layer, nn.Linear)
    vocab_size = layer.weight.shape[0]
    if not 0 < k <= vocab_size:
        raise ConfigError(f"wanted k from 1 to the {vocab_size} tokens of the vocabulary, got {k}; choose another")
    _describe(folder, {"k": k, "vocab_size": vocab_size, "dtype": str(dtype), "teacher": fingerprint(teacher)})
    known = set(_index(folder))
    steps = range(here.rank, batches.steps, here.world)
    with stages("teacher", len(steps) * batches.rows * batches.length, "tokens") as advance:
        for step in steps:
            rows = {key: row for row in batches.batch(step) if (key := row_key(row)) not in known}
            known |= rows.keys()
            if rows:
                tokens = torch.stack(list(rows.values()))
                parts = [
                    _top_k(teacher, part, k, dtype, here.precision) for part in tokens.split(micro_rows or len(tokens))
                ]
                names = ("indices", "log_probs", "rest")
                entries = {
                    name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)
                }
                entries["keys"] = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, KEY_BYTES)
                _save(entries, folder, step)
            advance(batches.rows * batches.length)


def row_key(row: Int64[Tensor, "T+1"]) -> bytes:
    """A hash of a row's tokens."""
    return hashlib.blake2b(row.cpu().numpy().astype("<i8").tobytes(), digest_size=KEY_BYTES).digest()


def top_k_sums(
    targets: Int64[Tensor, "n"],
    indices: Int[Tensor, "n k"],
    log_probs: Float[Tensor, "n k"],
    rest: Float32[Tensor, "n"],
    hidden: Float[Tensor, "n D"],
    layer: OutputLayer,
    learns_text: bool,
) -> Float32[Tensor, "2"]:
    """Cross-entropy of a chunk, and KL(teacher || student) over the kept tokens and a bucket for all others.

    Both are summed over positions; unless it `learns_text`, the cross-entropy has no gradient.
    """
    logits, kept = project(hidden, layer), indices.long()
    norm = logits.logsumexp(-1, keepdim=True)
    log_p, log_teacher = logits.gather(-1, kept) - norm, log_probs.float()
    if kept.shape[-1] < logits.shape[-1]:
        # Of the others themselves and not 1 minus the kept, which has no digits left where the rest is small.
        others = logits.scatter(-1, kept, -torch.inf).logsumexp(-1, keepdim=True) - norm
        log_p, log_teacher = torch.cat([log_p, others], -1), torch.cat([log_teacher, rest[:, None]], -1)
    log_teacher = F.log_softmax(log_teacher, dim=-1)  # a distribution again after rounding
    kl = F.kl_div(log_p, log_teacher, reduction="sum", log_target=True)
    lm = (norm - logits.gather(-1, targets[:, None])).sum()
    return torch.stack([lm if learns_text else lm.detach(), kl])


@dataclass
class TopKDistillation:
    """`Distillation` from what `top_k_teacher` wrote to `folder`; no teacher in memory.

    The KL runs over the teacher's k likeliest tokens and one bucket with the rest of the mass on either side. Merging
    tokens into a bucket can only lower a KL (the log-sum inequality), so the value logged as `kl_top_k` is a lower
    bound of the full KL: it does not see how the student orders the tokens that were left out. Rows are found by their
    tokens. `lm_weight`, `chunk_tokens` and `sums` (default `top_k_sums`) are as in `Distillation`.

    Raises ConfigError if the folder holds no entries, lacks those of a row, or has another vocabulary.
    """

    folder: Path
    _: KW_ONLY
    lm_weight: float = 0.0
    chunk_tokens: int | None = None
    sums: Callable[..., Tensor] = top_k_sums
    _rows: dict[bytes, tuple[Path, int]] = field(init=False, repr=False, compare=False)
    _vocab_size: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Read which rows there are."""
        check_lm_weight(self.lm_weight)
        path = self.folder / DESCRIPTION
        if not path.is_file():
            raise ConfigError(f"{self.folder}: wanted a teacher's entries, got no {DESCRIPTION}; let a teacher fill it")
        self._rows = _index(self.folder)
        self._vocab_size = json.loads(path.read_text(encoding="utf-8"))["vocab_size"]

    def __call__(self, model: PreTrainedModel, tokens: Int64[Tensor, "B T+1"]) -> Losses:
        """The loss on a batch."""
        entries = self._entries(tokens)
        hidden, layer = last_hidden(model, tokens)
        vocab_size = len(layer.weight)
        if vocab_size != self._vocab_size:
            raise ConfigError(
                f"{self.folder}: wanted entries of a teacher with the student's {vocab_size} tokens, got "
                f"{self._vocab_size}; use the model that the student was converted from"
            )
        found = mean_over_chunks(
            self.sums,
            (tokens[:, 1:].flatten(), *entries),
            hidden,
            layer,
            self.lm_weight > 0,
            shares=(self.lm_weight, 1 - self.lm_weight),
            chunk_tokens=self.chunk_tokens,
        )
        lm, kl = found.parts
        return Losses(found.total, {"lm": lm, "kl_top_k": kl})

    @torch.autocast("cpu", enabled=False)  # which joins no tensors of fp16
    def _entries(self, tokens: Int64[Tensor, "B T+1"]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids `[B * T, k]`, their log-probabilities, and the log of the rest `[B * T]`, in the rows' order."""
        keys = [row_key(row) for row in tokens.cpu()]
        if missing := sum(key not in self._rows for key in keys):
            raise ConfigError(
                f"{self.folder}: wanted the teacher's entries of every row, got none for {missing} of {len(keys)}; "
                "let the teacher fill the folder for this text, seed and length"
            )
        places = [self._rows[key] for key in keys]
        found: list[tuple[Tensor, ...]] = [()] * len(places)
        for path in {path for path, _ in places}:
            with safe_open(path, framework="pt") as file:
                slices = [file.get_slice(name) for name in ("indices", "log_probs", "rest")]
                for i, (of_row, row) in enumerate(places):
                    if of_row == path:
                        found[i] = tuple(one[row] for one in slices)
        indices, log_probs, rest = (torch.cat(column).to(tokens.device) for column in zip(*found, strict=True))
        return indices, log_probs, rest


@torch.no_grad()
def _top_k(
    teacher: PreTrainedModel, tokens: Int64[Tensor, "B T+1"], k: int, dtype: torch.dtype, precision: Precision
) -> Sequence[Tensor]:
    """Token ids and log-probabilities `[B, T, k]`, and the log of what is left over `[B, T]`, on the CPU."""
    parts = []
    with precision_context(teacher.device, precision):
        hidden, layer = last_hidden(teacher, tokens.to(teacher.device))
        for chunk in hidden.split(max(1, CHUNK_BYTES // (4 * len(layer.weight)))):
            log_p = F.log_softmax(project(chunk, layer), dim=-1)
            kept = log_p.topk(k, dim=-1)
            rest = log_p.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)
            parts.append((kept.indices.int().cpu(), kept.values.to(dtype).cpu(), rest.cpu()))
    return [torch.cat(column).unflatten(0, (len(tokens), -1)) for column in zip(*parts, strict=True)]


def _describe(folder: Path, description: dict[str, Any]) -> None:
    """Note what the folder holds; raise ConfigError if that is something else."""
    path = folder / DESCRIPTION
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in description if found.get(name) != description[name]]
        if changed:
            raise ConfigError(
                f"{folder}: wanted an empty folder or this teacher's entries, got others ({', '.join(changed)} differ)"
                "; name another folder, or delete it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial-{os.getpid()}")
    partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _index(folder: Path) -> dict[bytes, tuple[Path, int]]:
    """File and position of every row, by its key."""
    places: dict[bytes, tuple[Path, int]] = {}
    for path in sorted(folder.glob("step-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys = file.get_tensor("keys").numpy()
        places |= {key.tobytes(): (path, row) for row, key in enumerate(keys)}
    return places


def _save(entries: dict[str, Tensor], folder: Path, step: int) -> None:
    """Write a step; of a step that had entries, after another text, beside them."""
    taken = len(list(folder.glob(f"step-{step:08d}*.safetensors")))
    path = folder / (f"step-{step:08d}" + (f"-{taken}" if taken else "") + ".safetensors")
    partial = path.with_suffix(f".partial-{os.getpid()}")
    save_file(entries, partial)
    partial.replace(path)
