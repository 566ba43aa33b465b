"""Packed text and its batches: the same at every resume and for every number of processes."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import ConfigError, TextError
from headfuse.training import batches as batches_module
from headfuse.training.batches import Batches, TrainingText, token_digest, training_text
from tiny_tokenizer import BOS, VOCABULARY, tiny_tokenizer

TEXTS = [f"Document number {i} says something about the weather in town {i}." for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


class Untouchable:
    """A tokenizer that may be told apart, but not used on a text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def get_vocab(self):
        return self.tokenizer.get_vocab()

    def __call__(self, text):
        assert isinstance(text, str), "documents come in lists"
        return self.tokenizer(text)


def counting_text(size):
    tokens = np.arange(size, dtype=np.uint16)
    return TrainingText(tokens, "counting", token_digest(tokens))


def read(source, cache, tokenizer=None, *, num_tokens=500, vocab_size=VOCABULARY, seed=0):
    options = {"num_tokens": num_tokens, "vocab_size": vocab_size, "seed": seed, "cache": cache}
    return training_text(None if source is None else str(source), tokenizer, **options)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def test_a_file_of_token_ids_is_mapped_and_not_copied(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(200, dtype=np.uint32).reshape(2, 100))
    text = read(tmp_path / "t.npy", tmp_path / "cache")
    assert isinstance(text.tokens, np.memmap)
    assert text.tokens.dtype == np.uint32
    assert text.tokens.tolist() == list(range(200))
    assert not (tmp_path / "cache").exists()


def test_documents_are_packed_whole_in_a_seeded_order_with_the_tokenizers_special_tokens(tmp_path, jsonl, tokenizer):
    text = read(jsonl, tmp_path / "cache", tokenizer, num_tokens=10**6)
    pieces = np.split(text.tokens, np.flatnonzero(text.tokens == BOS))[1:]
    assert sorted(tokenizer.decode(piece[1:]) for piece in pieces) == sorted(TEXTS)
    assert [tokenizer.decode(piece[1:]) for piece in pieces] != TEXTS
    other = read(jsonl, tmp_path / "other", tokenizer, num_tokens=10**6, seed=1)
    assert other.digest != text.digest


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary(tmp_path, jsonl, tokenizer, vocab_size, dtype):
    text = read(jsonl, tmp_path, tokenizer, vocab_size=vocab_size)
    assert text.tokens.dtype == dtype
    assert isinstance(text.tokens, np.memmap)


def test_no_more_is_packed_than_can_be_predicted(tmp_path, tokenizer):
    text = read(None, tmp_path, tokenizer, num_tokens=1000)
    assert text.tokens.size == 1001
    assert text.name == "builtin"
    assert text.num_rows(20) == 50
    assert len(Batches(text, rows=5, length=20, steps=10, seed=0).batch(9)) == 5


def test_a_hub_data_set_is_read_as_far_as_wanted(tmp_path, tokenizer, monkeypatch):
    class Stream:
        def shuffle(self, seed, buffer_size):
            return self

        def __iter__(self):
            while True:  # it has no end
                yield {"text": TEXTS[0]}

    module = ModuleType("datasets")
    module.load_dataset = lambda *args, **options: Stream()
    monkeypatch.setitem(sys.modules, "datasets", module)
    text = read("org/name", tmp_path, tokenizer, num_tokens=300)
    assert text.tokens.tolist() == (tokenizer(TEXTS[0])["input_ids"] * 10)[:301]


def test_the_same_call_reads_the_cache_without_a_tokenizer_pass(tmp_path, jsonl, tokenizer):
    first = read(jsonl, tmp_path, tokenizer)
    again = read(jsonl, tmp_path, Untouchable(tokenizer))
    assert again.digest == first.digest
    assert again.tokens.tolist() == first.tokens.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.jsonl", "tokens.json", "tokens.npy"]


@pytest.mark.parametrize("change", ["source", "content", "seed", "num_tokens", "tokenizer", "cut short"])
def test_whatever_changes_the_text_packs_it_anew(tmp_path, jsonl, tokenizer, change):
    cache = tmp_path / "cache"
    first = read(jsonl, cache, tokenizer).tokens.tolist()
    options = {"seed": {"seed": 1}, "num_tokens": {"num_tokens": 400}}.get(change, {})
    if change == "content":
        jsonl.write_text(json.dumps({"text": "Something else."}), encoding="utf-8")
    elif change == "tokenizer":
        tokenizer = tiny_tokenizer(adds_bos=False)
    elif change == "cut short":
        np.save(cache / "tokens.npy", np.zeros(3, np.uint16))
    found = read(None if change == "source" else jsonl, cache, tokenizer, **options)
    fresh = read(None if change == "source" else jsonl, tmp_path / "fresh", tokenizer, **options)
    assert found.tokens.tolist() == fresh.tokens.tolist()
    assert (found.tokens.tolist() == first) == (change == "cut short")


def test_the_arrays_of_an_npz_are_packed_one_after_the_other(tmp_path):
    np.savez(tmp_path / "t.npz", b=np.full(3, 2, np.int64), a=np.full(2, 1, np.uint32))
    text = read(tmp_path / "t.npz", tmp_path / "cache")
    assert text.tokens.tolist() == [1, 1, 2, 2, 2]
    assert text.tokens.dtype == np.uint16


def test_the_digest_depends_on_length_type_and_content():
    tokens = np.arange(10**6, dtype=np.uint32)
    changed = tokens.copy()
    changed[-1] = 0
    same = token_digest(tokens.copy())
    assert token_digest(tokens) == same
    assert len({same, token_digest(tokens[:-1]), token_digest(tokens.astype(np.uint64)), token_digest(changed)}) == 4


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_ids_outside_the_vocabulary_are_an_error(tmp_path, monkeypatch, suffix, bad):
    monkeypatch.setattr(batches_module, "BLOCK", 7)
    array, path = np.zeros(50, np.int32), tmp_path / f"t{suffix}"
    array[40] = bad
    np.save(path, array) if suffix == ".npy" else np.savez(path, a=array)
    with pytest.raises(TextError, match=f"wanted token ids from 0 to {VOCABULARY - 1}, got {bad}"):
        read(path, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_text_without_a_tokenizer_is_an_error(tmp_path, jsonl):
    with pytest.raises(TextError, match="wanted a tokenizer"):
        read(jsonl, tmp_path)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_every_token_is_predicted_once_an_epoch(windows, length, rows, seed):
    text = counting_text(windows * length + 1)
    steps = windows // rows
    if not steps:
        return
    batches = Batches(text, rows=rows, length=length, steps=steps, seed=seed)
    seen = torch.cat([batches.batch(step) for step in range(steps)])
    assert seen.dtype == torch.int64
    assert (seen.diff(dim=1) == 1).all()
    predicted = seen[:, 1:].flatten()
    assert len(predicted.unique()) == len(predicted) == steps * rows * length
    if windows % rows == 0:
        assert predicted.sort().values.tolist() == list(range(1, windows * length + 1))


def test_a_batch_depends_on_the_step_alone():
    batches, fresh = (Batches(counting_text(1000), rows=4, length=8, steps=30, seed=3) for _ in range(2))
    whole = [batches.batch(step) for step in range(30)]
    for step in (29, 7, 0, 15):
        assert torch.equal(fresh.batch(step), whole[step])
    other = Batches(counting_text(1000), rows=4, length=8, steps=30, seed=4)
    assert not torch.equal(other.batch(0), whole[0])


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_shares_of_all_processes_make_the_batch(world):
    batches = Batches(counting_text(500), rows=6, length=8, steps=15, seed=0, repeat=True)
    for step in (0, 9, 14):
        shares = [batches.batch(step, rank=rank, world=world) for rank in range(world)]
        assert torch.equal(torch.cat(shares), batches.batch(step))


def test_a_repeated_text_comes_in_another_order_each_time_round():
    batches = Batches(counting_text(10 * 8 + 1), rows=5, length=8, steps=6, seed=0, repeat=True)
    epochs = [torch.cat([batches.batch(step) for step in (first, first + 1)])[:, 0].tolist() for first in (0, 2, 4)]
    assert [sorted(starts) for starts in epochs] == [list(range(0, 80, 8))] * 3
    assert len({tuple(starts) for starts in epochs}) == 3


def test_a_text_shorter_than_a_batch_repeats_within_it():
    batches = Batches(counting_text(2 * 8 + 1), rows=5, length=8, steps=2, seed=0, repeat=True)
    starts = torch.cat([batches.batch(0), batches.batch(1)])[:, 0]
    assert starts.bincount().tolist() == [5, *[0] * 7, 5]


def test_a_budget_beyond_the_text_is_an_error():
    text = counting_text(96)
    with pytest.raises(TextError, match=r"counting: wanted 97 tokens \(4 steps of 3 rows of 8\), got 96; .*--repeat"):
        Batches(text, rows=3, length=8, steps=4, seed=0)
    Batches(text, rows=3, length=8, steps=4, seed=0, repeat=True)
    with pytest.raises(TextError, match="wanted at least 97 tokens, got 96; give more text or shorter rows"):
        Batches(text, rows=3, length=96, steps=4, seed=0, repeat=True)


def test_rows_that_cannot_be_shared_are_an_error():
    batches = Batches(counting_text(100), rows=4, length=8, steps=1, seed=0)
    with pytest.raises(ConfigError, match="wanted rows that 3 processes can share evenly, got 4"):
        batches.batch(0, world=3)
