"""Exact match: batches padded on the left write what prompts alone do, and answers are compared letter for letter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import TextError
from headfuse.evaluation.exact_match import batches_by_length, measure_exact_match, write_answers
from headfuse.models.dha import DHA_CLASSES
from headfuse.progress import silent
from headfuse.text.example_files import Example
from headfuse.text.examples import encode_prompts
from pico import FAMILIES, every_family, logits_of, pico
from pico_dha import pico_dha
from tiny_tokenizer import BOS, EOS, VOCABULARY, tiny_tokenizer

SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 0}
PROMPTS = ["a", "Where is the hen?", "the cat met the other one", "b: ", "1 + 1 ="]
EXAMPLES = [Example(prompt, "the answer"[: i + 3], "t") for i, prompt in enumerate(PROMPTS)]
NEW_TOKENS = 6  # " the ans" is the longest answer: " the", " ", three letters, and its eos
needs_gpu = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model():
    return pico("llama", **SIZES)


def one_by_one(model, tokenizer, prompt, new_tokens=NEW_TOKENS):
    (ids,) = encode_prompts([prompt], tokenizer)
    row, start = torch.tensor([ids]), len(ids)
    for _ in range(new_tokens):
        row = torch.cat([row, logits_of(model, row)[:, -1:].argmax(-1)], dim=1)
        if row[0, -1] == EOS:
            break
    return tokenizer.decode(row[0, start:], skip_special_tokens=True).strip()


def assert_batches_change_nothing(model, tokenizer):
    wanted = [one_by_one(model, tokenizer, prompt) for prompt in PROMPTS]
    for batch_tokens in (1, 60, 10_000):
        assert write_answers(model, tokenizer, EXAMPLES, batch_tokens=batch_tokens) == wanted


@every_family
def test_a_batch_writes_what_each_prompt_alone_does(family, tokenizer):
    assert_batches_change_nothing(pico(family, **SIZES), tokenizer)


@every_family
def test_so_do_decoupled_heads(family, tokenizer):
    classes, fields = DHA_CLASSES[family], FAMILIES[family][1] | SIZES
    config = classes.config(**fields, key_map=[[0, 0, 1, 1], [0, 0, 0, 0]], value_map=[[0, 0, 0, 1], [0, 1, 2, 3]])
    torch.manual_seed(0)
    model = classes.model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    assert_batches_change_nothing(model, tokenizer)


def generated(model, prompt, **options):
    """The tokens that transformers writes behind a prompt."""
    ids = torch.tensor([prompt], device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 20} | options
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("device", ["cpu", needs_gpu])
@pytest.mark.parametrize("make", [pico, pico_dha])
def test_answers_are_those_of_generate_wherever_they_end(make, device, tokenizer):
    model = make("llama", **SIZES).to(device)
    prompts = [word * count for count in (1, 3, 5, 12) for word in ("x", "Is it?", "the cat ")]
    examples = [Example(prompt, "z" * 18, "t") for prompt in prompts]  # with a space in front and an eos behind: 20
    ids = encode_prompts(prompts, tokenizer)
    ends = [EOS, generated(model, ids[4])[0], generated(model, ids[5])[6]]
    rows = [generated(model, prompt, eos_token_id=ends) for prompt in ids]
    assert {1, 20} < {len(row) for row in rows}  # some end at once, some later, some never
    wanted = [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    model.generation_config.eos_token_id = ends
    for batch_tokens in (1, 200, 500, 10_000):
        assert write_answers(model, tokenizer, examples, batch_tokens=batch_tokens) == wanted


@pytest.mark.parametrize("replayed", [False, True])
@given(lengths=st.lists(st.integers(2, 4000), max_size=200), batch_tokens=st.integers(1, 20_000))
def test_batches_hold_every_row_once_within_the_bound(replayed, lengths, batch_tokens):
    found = list(batches_by_length(lengths, batch_tokens, replayed=replayed))
    order = [row for _, batch in found for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)
    for room, batch in found:
        needed = lengths[batch[0]]
        assert needed <= room <= (max(needed * 5 / 4, needed + 15) if replayed else needed)
        assert len(batch) * room <= batch_tokens or len(batch) == 1


def test_replayed_batches_have_few_shapes():
    lengths = list(range(2, 2000))
    shapes, others = (
        {(room, len(batch)) for room, batch in batches_by_length(lengths, 16_384, replayed=each)}
        for each in (True, False)
    )
    assert len(shapes) < 30 < len(others)  # 4 rooms to each doubling, and the last batch
    assert len({room for room, _ in shapes}) >= len(shapes) - 1


def test_writing_ends_at_the_tokenizer_s_eos(tokenizer):
    model = pico("llama", **SIZES)
    assert one_by_one(model, tokenizer, "a")
    first = logits_of(model, torch.tensor(encode_prompts(["a"], tokenizer)))[0, -1].argmax()
    with torch.no_grad():  # what was likeliest is eos now
        rows = model.lm_head.weight
        pair = torch.tensor([EOS, int(first)])
        rows[pair] = rows[pair.flip(0)]
    assert write_answers(model, tokenizer, [Example("a", "bcd", "t")]) == [""]


def test_the_model_s_own_settings_do_not_matter(model, tokenizer):
    wanted = write_answers(model, tokenizer, EXAMPLES)
    usual = model.generation_config.to_dict()
    try:
        model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, max_new_tokens=1)
        assert write_answers(model, tokenizer, EXAMPLES) == wanted
    finally:
        model.generation_config.update(**usual)


def alphabet(tokenizer):
    """A model that goes from each letter to the next, and from z to the end."""
    model = pico("llama", **SIZES)
    following = (torch.arange(VOCABULARY) + 1) % VOCABULARY
    end, swapped = tokenizer.convert_tokens_to_ids("z"), tokenizer.convert_tokens_to_ids("z") + 1
    following[[end, BOS]] = torch.tensor([EOS, swapped])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embeddings = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=-1)
        model.model.embed_tokens.weight.copy_(embeddings)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[following] = embeddings
    return model


def test_answers_are_compared_by_task_without_the_spaces_around_them(tokenizer):
    model = alphabet(tokenizer)
    pairs = {"x": "yz", "Is it w": "xyz", "a u": "vwxyz ", "y": "z!", "the v": "wx"}
    examples = [Example(prompt, answer, "first" if "z" in answer else "second") for prompt, answer in pairs.items()]
    told = []

    def stages(name, total, unit):
        told.append((name, total, unit))
        return silent(name, total, unit)

    assert write_answers(model, tokenizer, examples) == ["yz", "xyz", "vwxyz", "z", "wxyz"]
    found = measure_exact_match(model, tokenizer, examples, progress=stages)
    assert found["first"] == {"questions": 4, "exact_match": 0.75, "exact_match_stderr": 0.25}
    assert found["second"] == {"questions": 1, "exact_match": 0.0, "exact_match_stderr": 0.0}
    assert found["average"] == {"questions": 5, "exact_match": 0.375}
    assert told == [("exact match first", 4, "questions"), ("exact match second", 1, "questions")]
    assert measure_exact_match(model, tokenizer, examples[:4], limit=2) == {
        "first": {"questions": 2, "exact_match": 1.0, "exact_match_stderr": 0.0}
    }


def test_long_prompts_lose_their_start_with_a_warning(model, tokenizer):
    long, answer = Example("b" * 300, "cc", "t"), "cc"
    with pytest.warns(UserWarning, match="t: 1 of 2 prompts exceed 124 positions and lose their start"):
        found = write_answers(model, tokenizer, [long, Example("a", answer, "t")], "t")
    assert found[0] == one_by_one(model, tiny_tokenizer(adds_bos=False), "b" * 124, 4)
    with pytest.raises(TextError, match=r"t: wanted answers shorter than .* 128 positions, got one of 302 tokens"):
        write_answers(model, tokenizer, [Example("a", "b" * 300, "t")], "t")
