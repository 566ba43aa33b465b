"""Examples: what is read, what is refused, and which tokens a prompt and an answer are."""

import json

import pytest
from tokenizers import processors

from headfuse.errors import TextError
from headfuse.text.example_files import Example, read_examples
from headfuse.text.examples import encode_examples, encode_prompts, holds_examples, load_examples
from tiny_tokenizer import BOS, EOS, tiny_tokenizer

GOOD = {"prompt": "Is it so?", "answer": "yes"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(prompt, answer, tokenizer=None):
    (found,) = encode_examples([Example(prompt, answer, "t")], tokenizer or tiny_tokenizer())
    return found.ids[: found.num_prompt].tolist(), found.ids[found.num_prompt :].tolist()


def test_examples_come_in_file_order_under_their_task_or_the_file_s_name(tmp_path):
    path = write(tmp_path / "mine.jsonl", [GOOD, GOOD | {"answer": "né", "task": "other", "more": 1}])
    path.write_text(path.read_text() + "\n")
    assert read_examples(path) == [Example("Is it so?", "yes", "mine"), Example("Is it so?", "né", "other")]
    assert load_examples(str(path), "train") == load_examples(str(path), "val") == read_examples(path)


BAD = {
    "no json": ("{", r":1: wanted lines of JSON"),
    "no utf-8": (b"\xff", "wanted lines of JSON"),
    "a list": ("[1]", ":1: wanted a JSON object a line, got list"),
    "no answer": ('{"prompt": "a"}', r":1: wanted a string field 'answer', got \['prompt'\]"),
    "a number": ('{"prompt": 1, "answer": "a"}', ":1: wanted a string field 'prompt'"),
    "a task that is none": ('{"prompt": "a", "answer": "a", "task": 3}', ":1: wanted a string field 'task'"),
    "empty": ("\n", "wanted examples, got an empty file"),
    "an empty answer": (json.dumps(GOOD) + '\n{"prompt": "a", "answer": " "}', ":2: wanted some text in 'answer'"),
    "an empty prompt": (json.dumps(GOOD) + '\n\n{"prompt": "", "answer": "b"}', ":3: wanted some text in 'prompt'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_example_is_an_error_with_its_line(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TextError, match=message) as caught:
        read_examples(path)
    assert "\n" not in str(caught.value)


def test_a_source_of_examples_is_told_from_plain_text(tmp_path):
    assert holds_examples(str(write(tmp_path / "examples.jsonl", [GOOD])))
    for rows in ([{"text": "a"}], [], [["prompt", "answer"]]):
        assert not holds_examples(str(write(tmp_path / "text.jsonl", rows)))
    (tmp_path / "broken.jsonl").write_text("{")
    for other in (tmp_path / "broken.jsonl", tmp_path, tmp_path / "absent.jsonl", "builtin", None):
        assert not holds_examples(None if other is None else str(other))


@pytest.mark.parametrize(("name", "got"), [("absent.jsonl", "no such file"), ("", "a folder"), ("t.txt", "t.txt")])
def test_what_holds_no_examples_is_an_error(tmp_path, name, got):
    (tmp_path / "t.txt").write_text("text")
    with pytest.raises(TextError, match=f"wanted a .jsonl file of examples, or the task mix, got {got}"):
        load_examples(str(tmp_path / name), "val")


def test_a_prompt_is_tokenised_as_alone_and_an_answer_ends_with_eos():
    tokenizer = tiny_tokenizer()
    prompt, answer = encode("Where?", "on the hill")
    assert prompt == tokenizer("Where?")["input_ids"]
    assert (prompt[0], answer[-1]) == (BOS, EOS)
    assert tokenizer.decode(answer) == " on the hill</s>"


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [("so:", "the", "so: the"), ("so: ", "the", "so: the"), ("so:", "\nthe", "so:\nthe"), ("t", "he", "t he")],
)
def test_a_space_is_put_where_there_is_none_and_no_token_crosses_the_border(prompt, answer, text):
    tokenizer = tiny_tokenizer()
    before, after = encode(prompt, answer)
    assert tokenizer.decode([*before, *after]) == f"<s>{text}</s>"
    assert tokenizer.decode(before) == f"<s>{prompt}"


def test_an_eos_that_the_tokenizer_adds_behind_a_prompt_is_left_out():
    tokenizer = tiny_tokenizer()
    specials = [("<s>", BOS), ("</s>", EOS)]
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    tokenizer.backend_tokenizer.post_processor = ends
    assert encode("Where?", "here", tokenizer) == encode("Where?", "here")
    assert encode_prompts(["a</s>"], tiny_tokenizer(adds_bos=False))[0][-1] == EOS


def test_many_examples_are_encoded_like_one(monkeypatch):
    examples = [Example("a" * (i + 1), "b" * (i % 3 + 1), "t") for i in range(7)]
    whole = encode_examples(examples, tiny_tokenizer())
    monkeypatch.setattr("headfuse.text.examples.EXAMPLES_PER_CALL", 2)
    parted = encode_examples(examples, tiny_tokenizer())
    assert [one.ids.tolist() for one in whole] == [one.ids.tolist() for one in parted]
    assert [one.num_prompt for one in whole] == [i + 2 for i in range(7)]


def test_a_tokenizer_without_eos_or_a_prompt_without_tokens_is_an_error():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(TextError, match="wanted a tokenizer with an eos token"):
        encode("a", "b", tokenizer)
    with pytest.raises(TextError, match="wanted a prompt of at least one token"):
        encode_prompts([""], tiny_tokenizer(adds_bos=False))
