"""Training text and batches, which depend on nothing but the step, so that a run can resume anywhere."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headfuse.errors import ConfigError, TextError
from headfuse.text.examples import holds_examples
from headfuse.text.packing import packed_examples
from headfuse.text.rows import BUILTIN, check_range, existing_file, source_documents, tokenize_documents
from headfuse.text.token_files import SUFFIXES, Stream, read_streams
from headfuse.text.tokenizer import PROBE
from headfuse.training.options import TrainingOptions

# The largest vocabulary whose ids fit in uint16.
SMALL_VOCABULARY = 2**16
# Ids are looked at in blocks of this many: a mapped file is never in memory whole.
BLOCK = 2**22
DIGEST_BLOCKS, DIGEST_BLOCK = 64, 4096


class TrainingRows(Protocol):
    """What batches are cut from: rows of `length` predicted tokens each; `digest` says whether two are the same."""

    @property
    def name(self) -> str:
        """Where they come from."""
        ...

    @property
    def digest(self) -> str:
        """A hash of all there is."""
        ...

    def num_rows(self, length: int) -> int:
        """How many rows of that length there are."""
        ...

    def extent(self, num_rows: int, length: int) -> tuple[str, int]:
        """What so many rows take, in words, and how much of that there is."""
        ...

    def rows(self, numbers: Sequence[int], share: slice, length: int) -> Int64[Tensor, "n ... length+1"]:
        """Of a step of the rows with these numbers, those of the `share`."""
        ...


@dataclass(frozen=True)
class TrainingText:
    """A flat stream of token ids, mapped where it comes from a file; `digest` says whether two are the same.

    Its rows are windows of `length + 1` tokens that lie `length` apart, so the last token of one is the first of the
    next and each is predicted once. The tokens after the last whole one are not used.
    """

    tokens: Stream
    name: str
    digest: str

    def num_rows(self, length: int) -> int:
        """How many windows there are."""
        return max(self.tokens.size - 1, 0) // length

    def extent(self, num_rows: int, length: int) -> tuple[str, int]:
        """What so many rows take, in words, and how much of that there is."""
        return f"{num_rows * length + 1} tokens", self.tokens.size

    def rows(self, numbers: Sequence[int], share: slice, length: int) -> Int64[Tensor, "n length+1"]:
        """Of a step of the windows with these numbers, those of the `share`."""
        starts = [number * length for number in numbers[share]]
        found = np.empty((len(starts), length + 1), dtype=np.int64)
        for row, start in zip(found, starts, strict=True):
            row[:] = self.tokens[start : start + length + 1]
        return torch.from_numpy(found)


def training_rows(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    options: TrainingOptions,
    *,
    vocab_size: int,
    cache: Path,
) -> TrainingRows:
    """What a run trains on: examples packed for its rows where the source has prompts and answers, else plain text.

    Raises what `packed_examples` and `training_text` raise.
    """
    if source is not None and holds_examples(source):
        return packed_examples(source, tokenizer, length=options.length, vocab_size=vocab_size, seed=options.seed)
    tokens, seed = options.steps * options.step_tokens, options.seed
    return training_text(source, tokenizer, num_tokens=tokens, vocab_size=vocab_size, seed=seed, cache=cache)


def training_text(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_tokens: int,
    vocab_size: int,
    seed: int,
    cache: Path,
) -> TrainingText:
    """The training text of `source`: a `.npy` of token ids as it lies, all else packed once into `cache/tokens.npy`.

    Sources are those of `load_tokens`; of the builtin text, the part that calibrates. Documents come in an order drawn
    by `seed` and are tokenised one by one, with the special tokens that the tokenizer adds, until `num_tokens` can be
    predicted: `num_tokens + 1` ids, as the first is only read. A `.npz` is taken whole, one array after the other.
    `cache/tokens.json` says what was packed; the same call reads it again without a tokenizer pass, another one packs
    anew. Of several processes, let one call this before the others do.

    Raises TextError if the source is unknown, unreadable or empty, or holds ids outside the vocabulary.
    """
    name = source or BUILTIN
    path = None if name == BUILTIN else existing_file(name)
    suffix = "" if path is None else path.suffix.lower()
    if path is not None and suffix == ".npy":
        (tokens,) = read_streams(path).values()
        for _ in _checked(name, _blocks(tokens), vocab_size):
            pass
        return TrainingText(tokens, name, token_digest(tokens))
    recipe: dict[str, Any] = {"source": name, "vocab_size": vocab_size}
    if path is not None:
        recipe |= {"bytes": path.stat().st_size, "modified": path.stat().st_mtime_ns}
    if suffix not in SUFFIXES:
        if tokenizer is None:
            raise TextError(f"{name}: wanted a tokenizer to read text, got none; give one, or a .npy file of token ids")
        recipe |= {"num_tokens": num_tokens, "seed": seed, "tokenizer": _tokenizer_digest(tokenizer)}
    if (found := _packed(cache, recipe)) is not None:
        return found
    if tokenizer is None or suffix in SUFFIXES:
        assert path is not None
        ids: Iterable[Stream] = (block for stream in read_streams(path).values() for block in _blocks(stream))
    else:
        documents = source_documents(name, path, "calibration", seed, sample=True)
        ids = _limited(tokenize_documents(documents, tokenizer), num_tokens + 1)
    _pack(cache, recipe, _checked(name, ids, vocab_size), np.uint16 if vocab_size <= SMALL_VOCABULARY else np.uint32)
    packed = _packed(cache, recipe)
    assert packed is not None, "what was just packed is there"
    return packed


def token_digest(tokens: Stream) -> str:
    """SHA-256 of length, type and up to 64 blocks spread evenly over the stream: quick for any size."""
    digest = hashlib.sha256(f"{tokens.size} {tokens.dtype.str}".encode())
    starts = np.linspace(0, max(tokens.size - DIGEST_BLOCK, 0), DIGEST_BLOCKS).astype(np.int64)
    for start in np.unique(starts).tolist():
        digest.update(np.ascontiguousarray(tokens[start : start + DIGEST_BLOCK]).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Batches:
    """`steps` batches of `rows` rows of `length` predicted tokens, as a pure function of the step.

    Rows come in a permutation drawn by `seed`; with `repeat`, each time round the text in another one.

    Raises TextError if the text is too short for that many steps and may not repeat.
    """

    text: TrainingRows
    _: KW_ONLY
    rows: int
    length: int
    steps: int
    seed: int
    repeat: bool = False

    def __post_init__(self) -> None:
        """Refuse what the text cannot give."""
        wanted, found = self.rows * self.steps, self.text.num_rows(self.length)
        if found < (1 if self.repeat else wanted):
            needs, got = self.text.extent(wanted if found else 1, self.length)
            if not found:
                needs, remedy = f"at least {needs}", "give more text or shorter rows"
            else:
                needs = f"{needs} ({self.steps} steps of {self.rows} rows of {self.length})"
                remedy = "give more text, lower the budget, or go over it again with --repeat"
            raise TextError(f"{self.text.name}: wanted {needs}, got {got}; {remedy}")

    @classmethod
    def of(cls, text: TrainingRows, options: TrainingOptions) -> "Batches":
        """The batches of a run."""
        return cls(
            text,
            rows=options.rows,
            length=options.length,
            steps=options.steps,
            seed=options.seed,
            repeat=options.repeat,
        )

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Int64[Tensor, "rows/world ... length+1"]:
        """The batch of a step, or the share of process `rank` of `world`: the `rank`-th of equal runs of its rows.

        Raises ConfigError if the rows cannot be shared evenly.
        """
        assert 0 <= step < self.steps
        assert 0 <= rank < world
        if self.rows % world:
            raise ConfigError(
                f"wanted rows that {world} processes can share evenly, got {self.rows}; take a multiple of {world} "
                "(--rows)"
            )
        share = self.rows // world
        there = self.text.num_rows(self.length)
        numbers = []
        for position in range(step * self.rows, (step + 1) * self.rows):
            epoch, place = divmod(position, there)
            numbers.append(int(_order(there, self.seed, epoch)[place]))
        return self.text.rows(numbers, slice(rank * share, (rank + 1) * share), self.length)


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _order(rows: int, seed: int, epoch: int) -> Int64[Tensor, "rows"]:
    # Hashed: neighbouring seeds must not be each other's epochs.
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "big")
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))


def _blocks(stream: Stream) -> Iterator[Stream]:
    return (stream[start : start + BLOCK] for start in range(0, stream.size, BLOCK))


def _limited(documents: Iterable[list[int]], limit: int) -> Iterator[Stream]:
    left = limit
    for ids in documents:
        yield np.asarray(ids[:left], dtype=np.int64)
        left -= len(ids)
        if left <= 0:
            return


def _checked(name: str, blocks: Iterable[Stream], vocab_size: int) -> Iterator[Stream]:
    for block in blocks:
        if block.size:
            check_range(name, int(block.min()), int(block.max()), vocab_size)
            yield block


def _pack(cache: Path, recipe: dict[str, Any], blocks: Iterator[Stream], dtype: type[np.unsignedinteger]) -> None:
    """Write ids and recipe; the recipe comes last and goes first, so it never describes other ids."""
    cache.mkdir(parents=True, exist_ok=True)
    target, described = cache / "tokens.npy", cache / "tokens.json"
    partial = cache / f"tokens.partial-{os.getpid()}"
    try:
        with partial.open("wb") as file:
            # NumPy leaves room in the header for the number of rows to grow: it is written again at the end.
            _write_header(file, dtype, 0)
            start, size = file.tell(), 0
            for block in blocks:
                file.write(block.astype(dtype).tobytes())
                size += block.size
            file.seek(0)
            _write_header(file, dtype, size)
            assert file.tell() == start
        if not size:
            raise TextError(f"{recipe['source']}: wanted some text, got none; give a source that has text")
        described.unlink(missing_ok=True)
        partial.replace(target)
        digest = token_digest(np.load(target, mmap_mode="r"))
        partial.write_text(json.dumps(recipe | {"digest": digest}, indent=1) + "\n", encoding="utf-8")
        partial.replace(described)
    finally:
        partial.unlink(missing_ok=True)


def _write_header(file: IO[bytes], dtype: type[np.unsignedinteger], size: int) -> None:
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (size,)})


def _packed(cache: Path, recipe: dict[str, Any]) -> TrainingText | None:
    """The text in the cache if this recipe made it, else None."""
    try:
        found = json.loads((cache / "tokens.json").read_text(encoding="utf-8"))
        tokens = np.load(cache / "tokens.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    digest = token_digest(tokens)
    return TrainingText(tokens, recipe["source"], digest) if found == recipe | {"digest": digest} else None


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    content = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
