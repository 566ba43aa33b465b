"""Rows of token ids for calibration and evaluation, from whatever the user names as text."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from headfuse.errors import TextError
from headfuse.text.builtin import Part, builtin_documents
from headfuse.text.documents import READERS, Document, read_documents
from headfuse.text.hub import HUB_ID, hub_documents
from headfuse.text.token_files import SUFFIXES, Stream, read_streams

BUILTIN = "builtin"
DOCUMENTS_PER_CALL = 64  # of the tokenizer: few enough to stop early, many enough for its threads


@dataclass(frozen=True)
class TokenRows:
    """N rows of T token ids, and the domain that each row comes from."""

    tokens: Int64[Tensor, "N T"]
    domains: tuple[str, ...]
    row_domain: Int64[Tensor, "N"]  # index into `domains`

    @property
    def num_tokens(self) -> int:
        """N * T."""
        return self.tokens.numel()

    def digest(self) -> str:
        """SHA-256 of shape and ids: says whether two runs read the same text."""
        content = np.ascontiguousarray(self.tokens.numpy(), dtype="<i8").tobytes()
        return hashlib.sha256(f"{tuple(self.tokens.shape)}".encode() + content).hexdigest()


def load_tokens(
    source: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    num_tokens: int | None,
    length: int,
    seed: int,
    part: Part = "calibration",
    vocab_size: int | None = None,
    shorter: bool = False,
) -> TokenRows:
    """`num_tokens // length` rows sampled from `source`; with `num_tokens` None, all of it in order.

    A source that is `shorter` than that is taken whole, if it may be.

    `source` is a `.txt`, `.jsonl` or `.parquet` file (field or column `text`), a `.npy` or `.npz` file of token ids,
    a hub data set `name[:config[:split]]`, or `builtin` (also None), the text that needs no network. Documents are
    tokenised one by one, with the special tokens that the tokenizer adds, concatenated and cut; samples are whole
    documents drawn by `seed`. Token files need no tokenizer; their rows lie at seeded offsets and do not overlap, and
    the arrays of a `.npz` give equal shares. `part` divides the builtin text into two that share no paragraph; other
    sources are taken whole. Ids are checked against `vocab_size`, else against the tokenizer of a token file.

    Raises TextError if the source is unknown, unreadable, too short, or holds ids outside the vocabulary.
    """
    name = source or BUILTIN
    num_rows = _num_rows(num_tokens, length)
    path = None if name == BUILTIN else existing_file(name)
    if path is not None and path.suffix.lower() in SUFFIXES:
        rows = _sample_streams(path, num_rows, length, torch.Generator().manual_seed(seed), shorter=shorter)
        limit = vocab_size or (len(tokenizer) if tokenizer is not None else None)
    else:
        if tokenizer is None:
            raise TextError(f"{name}: wanted a tokenizer to read text, got none; give one, or a .npy file of token ids")
        documents = source_documents(name, path, part, seed, sample=num_rows is not None)
        rows = _tokenize(name, documents, tokenizer, num_rows, length, shorter=shorter)
        limit = vocab_size
    check_range(name, int(rows.tokens.min()), int(rows.tokens.max()), limit)
    return rows


def count_row_bytes(tokens: Int64[Tensor, "N T"], tokenizer: PreTrainedTokenizerBase) -> Int64[Tensor, "N"]:
    """UTF-8 bytes of the text that each row's tokens 1..T-1 stand for: what a language model predicts.

    Special tokens count as no bytes. A character cut by the border of a row counts as the decoder shows it, an error
    of at most three bytes a row.
    """

    def text_bytes(ids: Tensor) -> Int64[Tensor, "N"]:
        texts = tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return torch.tensor([len(text.encode("utf-8", "replace")) for text in texts])

    return text_bytes(tokens) - text_bytes(tokens[:, :1])


def _num_rows(num_tokens: int | None, length: int) -> int | None:
    if length < 2:
        raise TextError(f"wanted rows of at least 2 tokens, got a length of {length}; ask for longer rows")
    if num_tokens is None:
        return None
    if num_tokens < length:
        raise TextError(f"wanted at least one row of {length} tokens, got num_tokens={num_tokens}; ask for more tokens")
    return num_tokens // length


def existing_file(name: str) -> Path | None:
    """The file that `name` points at, or None if it looks like a hub id."""
    path = Path(name).expanduser()
    known = (*READERS, *SUFFIXES)
    if path.is_dir():
        raise TextError(f"{name}: wanted a text file, got a folder; give one file ({', '.join(known)})")
    if path.suffix.lower() in known or not HUB_ID.fullmatch(name):
        if not path.is_file():
            raise TextError(f"{name}: wanted a text file, got no such file; check the path, or use {BUILTIN!r}")
    elif not path.is_file():
        return None
    if path.suffix.lower() not in known:
        raise TextError(f"{name}: wanted one of {', '.join(known)}, got {path.suffix or 'no extension'!r}; convert it")
    return path


def source_documents(name: str, path: Path | None, part: Part, seed: int, *, sample: bool) -> Iterable[Document]:
    """The documents of a text source: in order, or as a `sample` in an order drawn by `seed`.

    Raises TextError if a hub data set is wanted in order: it may have no end.
    """
    if name != BUILTIN and path is None:
        if not sample:
            raise TextError(f"{name}: wanted a number of tokens for a hub data set, got none; say how many to read")
        return hub_documents(name, seed=seed)
    documents = builtin_documents(part) if path is None else read_documents(path)
    if not sample:
        return documents
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[i] for i in order.tolist()]


def tokenize_documents(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of each document, with the special tokens that the tokenizer adds."""
    for texts in _batches(documents):
        yield from tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]


def _tokenize(
    name: str,
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int | None,
    length: int,
    *,
    shorter: bool,
) -> TokenRows:
    stream: list[int] = []
    for ids in tokenize_documents(documents, tokenizer):
        stream.extend(ids)
        if num_rows is not None and len(stream) >= num_rows * length:
            break
    count = _rows_to_take(name, len(stream) // length, len(stream), num_rows, length, shorter=shorter)
    tokens = torch.tensor(stream[: count * length], dtype=torch.int64).view(count, length)
    return TokenRows(tokens, (name,), torch.zeros(count, dtype=torch.int64))


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    for document in documents:
        batch.append(document.text)
        if len(batch) == DOCUMENTS_PER_CALL:
            yield batch
            batch = []
    if batch:
        yield batch


def _sample_streams(
    path: Path, num_rows: int | None, length: int, generator: torch.Generator, *, shorter: bool
) -> TokenRows:
    streams = read_streams(path)
    slots = {name: stream.size // length for name, stream in streams.items()}
    total = sum(stream.size for stream in streams.values())
    count = _rows_to_take(str(path), sum(slots.values()), total, num_rows, length, shorter=shorter)
    shares = list(slots.values()) if num_rows is None else equal_shares(list(slots.values()), count)
    counts = {name: count for name, count in zip(slots, shares, strict=True) if count}
    if left_out := [name for name in slots if name not in counts]:
        warnings.warn(f"{path}: no row of {length} tokens comes from {', '.join(left_out)}", stacklevel=3)
    draw = None if num_rows is None else generator
    parts = [_stream_rows(streams[name], length, count, draw) for name, count in counts.items()]
    row_domain = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts.values())))
    return TokenRows(torch.cat(parts), tuple(counts), row_domain)


def equal_shares(capacity: Sequence[int], total: int) -> list[int]:
    """Split `total` as evenly as the capacities allow; it must not exceed their sum."""
    shares = [0] * len(capacity)
    left = total
    for position, index in enumerate(sorted(range(len(capacity)), key=lambda i: capacity[i])):
        shares[index] = min(capacity[index], left // (len(capacity) - position))
        left -= shares[index]
    assert left == 0, "more rows were asked for than there are"
    return shares


def _stream_rows(
    stream: Stream, length: int, count: int, generator: torch.Generator | None
) -> Int64[Tensor, "count length"]:
    slots, start = stream.size // length, 0
    chosen = torch.arange(slots)
    if generator is not None:
        start = int(torch.randint(stream.size - slots * length + 1, (1,), generator=generator))
        chosen = torch.randperm(slots, generator=generator)[:count].sort().values
    rows = torch.empty(len(chosen), length, dtype=torch.int64)
    for row, slot in zip(rows, chosen.tolist(), strict=True):
        offset = start + slot * length
        row.copy_(torch.from_numpy(stream[offset : offset + length].astype(np.int64)))
    return rows


def _rows_to_take(name: str, rows: int, tokens: int, num_rows: int | None, length: int, *, shorter: bool) -> int:
    """The number of rows to take; TextError says how many tokens there are."""
    wanted = 1 if num_rows is None or shorter else num_rows
    if rows < wanted:
        raise TextError(
            f"{name}: wanted {wanted * length} tokens ({wanted} rows of {length}), got {tokens}; "
            "ask for fewer tokens or shorter rows, or give more text"
        )
    return rows if num_rows is None else min(rows, num_rows)


def check_range(name: str, low: int, high: int, limit: int | None) -> None:
    """Raise TextError unless all ids, from `low` to `high`, belong to a vocabulary of `limit` tokens (None: any)."""
    if low < 0 or (limit is not None and high >= limit):
        raise TextError(
            f"{name}: wanted token ids from 0 to {'' if limit is None else limit - 1}, got {low if low < 0 else high}; "
            "the file was made with another tokenizer"
        )
