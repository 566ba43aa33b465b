"""Rows of tokens from every kind of source, and every way in which a source can be unusable."""

import json
import sys
from types import ModuleType

import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from headfuse.errors import TextError
from headfuse.text.rows import count_row_bytes, equal_shares, load_tokens
from tiny_tokenizer import BOS, tiny_tokenizer

TEXTS = [f"Document number {i} says something about the weather in town {i}." for i in range(20)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def load(source, tokenizer=None, *, num_tokens=None, length=8, seed=0, **options):
    return load_tokens(str(source), tokenizer, num_tokens=num_tokens, length=length, seed=seed, **options)


def write_text(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS), encoding="utf-8")
    else:
        parquet.write_table(pyarrow.table({"text": [*TEXTS, None]}), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents_are_tokenised_alone_and_concatenated_in_order(tmp_path, tokenizer, suffix):
    rows = load(write_text(tmp_path, suffix), tokenizer)
    stream = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    assert rows.tokens.dtype == torch.int64
    assert rows.tokens.flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert rows.domains == (str(tmp_path / f"text{suffix}"),)
    assert rows.row_domain.tolist() == [0] * len(rows.tokens)


def test_a_txt_file_keeps_its_text_and_long_ones_become_several_documents(tmp_path, tokenizer, monkeypatch):
    path = write_text(tmp_path, ".txt")
    assert tokenizer.decode(load(path, tokenizer).tokens.flatten(), skip_special_tokens=True) in path.read_text()
    monkeypatch.setattr("headfuse.text.documents.SECTION_CHARS", 200)
    rows = load(path, tokenizer)
    assert (rows.tokens == BOS).sum() > 2
    kept = tokenizer.decode(rows.tokens.flatten(), skip_special_tokens=True)
    assert all(text in kept for text in TEXTS[:-1])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_a_sample_is_seeded_and_has_the_tokens_asked_for(tmp_path, tokenizer, suffix, monkeypatch):
    monkeypatch.setattr("headfuse.text.documents.SECTION_CHARS", 100)
    path = write_text(tmp_path, suffix)
    first, again, other = (load(path, tokenizer, num_tokens=100, seed=seed) for seed in (0, 0, 1))
    assert first.tokens.shape == (12, 8)
    assert first.num_tokens == 96
    assert first.digest() == again.digest() != other.digest()


def test_the_builtin_text_is_the_default(tokenizer):
    default, named = (load_tokens(source, tokenizer, num_tokens=640, length=64, seed=3) for source in (None, "builtin"))
    held = load_tokens(None, tokenizer, num_tokens=640, length=64, seed=3, part="evaluation")
    assert default.digest() == named.digest() != held.digest()
    assert default.domains == ("builtin",)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_token_files_are_read_whole_in_order_without_a_tokenizer(tmp_path, dtype):
    np.save(tmp_path / "t.npy", np.arange(83, dtype=dtype))
    assert load(tmp_path / "t.npy").tokens.tolist() == np.arange(80).reshape(10, 8).tolist()


def test_sampled_rows_of_a_token_file_are_pieces_that_do_not_overlap(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(1003, dtype=np.uint16))
    rows = load(tmp_path / "t.npy", num_tokens=400, seed=5).tokens
    assert rows.shape == (50, 8)
    assert (rows.diff(dim=1) == 1).all()
    assert len(rows.flatten().unique()) == 400
    assert not torch.equal(rows, load(tmp_path / "t.npy", num_tokens=400, seed=6).tokens)


def test_domains_of_an_npz_give_equal_shares(tmp_path):
    np.savez(
        tmp_path / "t.npz", b=np.full(800, 2, np.uint16), a=np.full(17, 1, np.uint16), c=np.full(800, 3, np.uint16)
    )
    rows = load(tmp_path / "t.npz", num_tokens=12 * 8)
    assert rows.domains == ("a", "b", "c")
    assert rows.row_domain.bincount().tolist() == [2, 5, 5]
    assert (rows.tokens == rows.row_domain[:, None] + 1).all()


def test_a_domain_that_gives_no_row_is_a_warning(tmp_path):
    np.savez(tmp_path / "t.npz", a=np.zeros(5, np.uint16), b=np.zeros(16, np.uint16))
    with pytest.warns(UserWarning, match="no row of 8 tokens comes from a$"):
        rows = load(tmp_path / "t.npz")
    assert rows.domains == ("b",)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_equal_shares_fit_sum_up_and_are_level(capacity, data):
    total = data.draw(st.integers(0, sum(capacity)))
    shares = equal_shares(capacity, total)
    assert sum(shares) == total
    assert all(share <= most for share, most in zip(shares, capacity, strict=True))
    unfilled = [share for share, most in zip(shares, capacity, strict=True) if share < most]
    assert max(shares) <= min(unfilled, default=30) + 1


def test_row_bytes_are_those_of_the_predicted_text(tokenizer):
    text = "the déjà vu of the tenth"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert count_row_bytes(ids, tokenizer).tolist() == [len(text.encode())]
    assert count_row_bytes(ids[:, 1:], tokenizer).tolist() == [len(text.encode()) - len("t")]


def fake_hub(monkeypatch, rows=None, error=None):
    class Stream(list):
        def shuffle(self, seed, buffer_size):
            return self

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if error:
            raise error
        return Stream(rows)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_data_set_is_streamed(monkeypatch, tokenizer):
    calls = fake_hub(monkeypatch, [{"text": text} for text in TEXTS])
    rows = load("org/name:config:validation", tokenizer, num_tokens=64)
    assert calls == [(("org/name", "config"), {"split": "validation", "streaming": True})]
    assert rows.tokens.flatten().tolist() == [i for text in TEXTS for i in tokenizer(text)["input_ids"]][:64]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([{"body": "x"}], None, "wanted a string column 'text', got \\['body'\\]"),
        (None, ConnectionError("no route"), "wanted a data set of the hub, got no route"),
    ],
)
def test_a_hub_data_set_that_fails_is_an_error(monkeypatch, tokenizer, rows, error, message):
    fake_hub(monkeypatch, rows, error)
    with pytest.raises(TextError, match=message):
        load("org/name", tokenizer, num_tokens=64)


def test_an_unknown_id_without_the_package_is_an_error(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TextError, match="wanted 'builtin', an existing file or a hub data set"):
        load("wikitxt", tokenizer, num_tokens=64)


def test_a_hub_data_set_needs_a_number_of_tokens(tokenizer):
    with pytest.raises(TextError, match="wanted a number of tokens"):
        load("org/name", tokenizer)


BAD_FILES = {
    "missing.txt": (None, "wanted a text file, got no such file"),
    "not a file or id!": (None, "wanted a text file, got no such file"),
    "text.csv": (b"a,b", "wanted one of .txt, .jsonl, .parquet, .npy, .npz, got '.csv'"),
    "empty.txt": (b" \n", "wanted some text, got none"),
    "latin.txt": (b"caf\xe9", "wanted UTF-8 text, got byte 0xe9 at 3"),
    "short.txt": (b"short", "wanted 8 tokens \\(1 rows of 8\\), got 6"),
    "broken.jsonl": (b'{"text": "a"}\n{"text"\n', "broken.jsonl:2: wanted a JSON object a line"),
    "field.jsonl": (b'{"body": "a"}\n', "wanted a string field 'text', got \\['body'\\]"),
    "number.jsonl": (b'{"text": 3}\n', "wanted a string field 'text'"),
    "list.jsonl": (b"[1]\n", "wanted a string field 'text', got list"),
    "broken.parquet": (b"PAR1", "wanted a Parquet file"),
    "broken.npy": (b"no array", "wanted a NumPy .npy file, got no array of numbers; save it"),
    "broken.npz": (b"PK\x03\x04", "wanted a NumPy .npz file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_an_error(tmp_path, tokenizer, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        load(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(9, np.float32), "wanted token ids .* got dtype float32"),
        (np.zeros(0, np.uint16), "got an empty array"),
        (np.zeros(7, np.uint16), "wanted 8 tokens \\(1 rows of 8\\), got 7"),
        (np.full(9, 261, np.uint16), "wanted token ids from 0 to 260, got 261"),
        (np.full(9, -1, np.int32), "wanted token ids from 0 to 260, got -1"),
    ],
)
def test_a_bad_token_file_is_an_error(tmp_path, tokenizer, array, message):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(TextError, match=message):
        load(tmp_path / "t.npy", tokenizer)


def test_ids_outside_the_models_vocabulary_are_an_error(tmp_path, tokenizer):
    with pytest.raises(TextError, match="wanted token ids from 0 to 39"):
        load(write_text(tmp_path, ".txt"), tokenizer, vocab_size=40)


@pytest.mark.parametrize(("column", "message"), [("body", "wanted a column 'text'"), ("text", "wanted strings")])
def test_a_parquet_file_without_a_text_column_is_an_error(tmp_path, tokenizer, column, message):
    parquet.write_table(pyarrow.table({column: [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(TextError, match=message):
        load(tmp_path / "t.parquet", tokenizer)


def test_parquet_without_pyarrow_is_an_error(tmp_path, tokenizer, monkeypatch):
    path = write_text(tmp_path, ".parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TextError, match="wanted pyarrow"):
        load(path, tokenizer)


@pytest.mark.parametrize("suffix", [".txt", ".npz"])
def test_a_shorter_source_is_taken_whole_if_it_may_be(tmp_path, tokenizer, suffix):
    path = tmp_path / f"text{suffix}"
    if suffix == ".txt":
        path = write_text(tmp_path, suffix)
    else:
        np.savez(path, a=np.arange(20), b=np.arange(9))
    whole = load(path, tokenizer).tokens
    assert load(path, tokenizer, num_tokens=8 * (len(whole) + 1), shorter=True).tokens.shape == whole.shape
    assert len(load(path, tokenizer, num_tokens=16, shorter=True).tokens) == 2
    with pytest.raises(TextError, match="wanted 80000 tokens"):
        load(path, tokenizer, num_tokens=80_000, length=80_000, shorter=True)


def test_too_few_tokens_are_counted(tmp_path, tokenizer):
    with pytest.raises(TextError, match=r"wanted 99992 tokens \(12499 rows of 8\), got \d{3,4}; ask for fewer"):
        load(write_text(tmp_path, ".txt"), tokenizer, num_tokens=99_999)


def test_a_folder_a_missing_tokenizer_and_rows_without_tokens_are_errors(tmp_path, tokenizer):
    with pytest.raises(TextError, match="got a folder"):
        load(tmp_path, tokenizer)
    with pytest.raises(TextError, match="wanted a tokenizer"):
        load("builtin")
    with pytest.raises(TextError, match="at least one row of 8 tokens, got num_tokens=7"):
        load("builtin", tokenizer, num_tokens=7)
    with pytest.raises(TextError, match="rows of at least 2 tokens"):
        load("builtin", tokenizer, length=1)


def test_an_unreadable_file_is_an_error(tmp_path, tokenizer, monkeypatch):
    path = write_text(tmp_path, ".txt")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(TextError, match="wanted a readable file, got Permission denied"):
        load(path, tokenizer)
