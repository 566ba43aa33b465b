"""Packing: examples stay whole and apart, in what a model computes and in what they weigh."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import TextError
from headfuse.models.dha import DHA_CLASSES
from headfuse.text.packing import PackedRows, first_fit, pack, packed_examples
from headfuse.training.chunked_loss import project
from headfuse.training.objectives import last_hidden
from made_examples import encoded
from pico import FAMILIES, VOCABULARY, every_case, every_family, logits_of, pico
from tiny_tokenizer import VOCABULARY as TINY_VOCABULARY
from tiny_tokenizer import tiny_tokenizer


def packed(length=15, **options):
    return pack("made up", encoded(**options), length=length, seed=0)


def whole(text):
    rows = text.num_rows(text.length)
    return PackedRows.of(text.rows(range(rows), slice(None), text.length))


def logits_of_rows(model, rows):
    with torch.no_grad():
        return project(*last_hidden(model, rows.tokens, rows.positions)).unflatten(0, (len(rows.tokens), -1))


def assert_examples_are_apart(model):
    text = packed()
    assert [len(content) for content in text.contents] != [1] * len(text.contents)
    rows = whole(text)
    logits = logits_of_rows(model, rows)
    for row, content in enumerate(text.contents):
        start = 0
        for example in content:
            ids = torch.from_numpy(example.ids).long()[None]
            alone = logits_of(model, ids)[0]
            read = min(len(alone), text.length - start)  # the last token of a full row is only predicted
            torch.testing.assert_close(logits[row, start : start + read], alone[:read], rtol=1e-4, atol=1e-5)
            start += len(alone)
    changed = rows.tokens.clone()
    first = len(text.contents[0][0].ids)
    changed[0, :first] = (changed[0, :first] + 1) % VOCABULARY
    moved = logits_of_rows(model, rows._replace(tokens=changed))
    assert not torch.equal(moved[0, :first], logits[0, :first])
    assert torch.equal(moved[0, first:], logits[0, first:])
    assert torch.equal(moved[1:], logits[1:])


@every_case
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_example_in_a_row_has_the_logits_that_it_has_alone(family, overrides, attention):
    model = pico(family, **overrides)
    model.set_attn_implementation(attention)
    assert_examples_are_apart(model)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_so_it_is_with_decoupled_heads(family, attention):
    classes, fields = DHA_CLASSES[family], FAMILIES[family][1]
    config = classes.config(**fields, key_map=[[0, 0, 1, 1]] * 2, value_map=[[0, 0, 0, 1]] * 2)
    model = classes.model(config).eval()
    model.set_attn_implementation(attention)
    assert_examples_are_apart(model)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=30), st.integers(0, 3))
def test_every_example_is_in_one_row_whole(sizes, seed):
    examples = encoded(sizes)
    text = pack("made up", examples, length=15, seed=seed)
    rows = whole(text)
    found = []
    for row, (tokens, positions) in enumerate(zip(rows.tokens, rows.positions, strict=True)):
        starts = [*np.flatnonzero(positions.numpy() == 0), 16]
        pieces = [tokens[start:end].tolist() for start, end in pairwise(starts)]
        found += pieces[: len(text.contents[row])]
        assert all(not any(padding) for padding in pieces[len(text.contents[row]) :])
    assert sorted(found) == sorted(example.ids.tolist() for example in examples)
    assert text.left_out == 0


@given(st.lists(st.integers(1, 12), max_size=40))
def test_first_fit_is_first_fit(sizes):
    rows, left = [], []
    for number, size in enumerate(sizes):
        place = next((row for row, room in enumerate(left) if room >= size), len(rows))
        if place == len(rows):
            rows.append([])
            left.append(12)
        rows[place].append(number)
        left[place] -= size
    assert first_fit(sizes, 12) == rows


def test_weights_are_means_over_the_step_s_prompts_answers_and_examples():
    text = packed()
    rows = whole(text)
    examples = [example for content in text.contents for example in content]
    draws = torch.Generator().manual_seed(1)
    # A loss for every token of every example: laid out as the rows are, and as the examples are.
    laid, losses = torch.zeros_like(rows.prompt), []
    for row, content in enumerate(text.contents):
        start = 0
        for example in content:
            losses.append(torch.rand(example.ids.size, generator=draws))
            laid[row, start : start + example.ids.size] = losses[-1]
            start += example.ids.size
    answers = [loss[example.num_prompt :] for loss, example in zip(losses, examples, strict=True)]
    prompts = [loss[1 : example.num_prompt] for loss, example in zip(losses, examples, strict=True)]
    wanted = [torch.cat(prompts).mean(), torch.cat(answers).mean(), torch.stack([a.mean() for a in answers]).mean()]
    for weights, mean in zip(rows[2:], wanted, strict=True):
        torch.testing.assert_close((weights * laid)[:, 1:].mean(), mean)
        assert not weights[:, 0].any()


def test_a_batch_has_all_in_one_tensor_of_integers():
    text = packed()
    batch = text.rows(range(2), slice(None), 15)
    assert (batch.dtype, batch.shape) == (torch.int64, (2, 5, 16))
    assert torch.equal(PackedRows.of(batch).batch(), batch)


def test_a_share_weighs_as_in_the_whole_step():
    text = packed(length=9)
    numbers = [2, 0, 1, 3]
    parts = [text.rows(numbers, slice(start, start + 2), 9) for start in (0, 2)]
    assert torch.equal(torch.cat(parts), text.rows(numbers, slice(None), 9))


def test_rows_follow_the_seed_and_the_digest_follows_the_rows():
    first, again = packed(), packed()
    other = pack("made up", encoded(), length=15, seed=1)
    assert first.digest == again.digest
    assert len({first.digest, other.digest, packed(length=16).digest, packed(seed=1).digest}) == 4


def test_long_examples_are_counted_and_left_out(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "four, as everybody knows"}\n')
    options = {"length": 15, "vocab_size": TINY_VOCABULARY, "seed": 0}
    with pytest.warns(UserWarning, match=r"1 of 2 examples exceed 16 tokens and are left out"):
        text = packed_examples(str(path), tiny_tokenizer(), **options)
    assert (text.left_out, text.num_rows(15)) == (1, 1)
    with pytest.raises(TextError, match=r"wanted examples of at most 4 tokens, got none below 8; take longer rows"):
        packed_examples(str(path), tiny_tokenizer(), **(options | {"length": 3}))
    with pytest.raises(TextError, match="wanted token ids from 0 to 99"):
        packed_examples(str(path), tiny_tokenizer(), **(options | {"vocab_size": 100}))
    with pytest.raises(TextError, match="wanted a tokenizer to read examples, got none"):
        packed_examples(str(path), None, **options)
