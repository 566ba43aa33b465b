"""Tasks: both layouts are read as they are meant, and the scorer agrees with scoring one request at a time."""

import gzip
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from headfuse.errors import CheckpointError, ConfigError, TextError
from headfuse.evaluation.loglikelihood import Score, encode_requests, score_requests
from headfuse.evaluation.report import EvaluationReport
from headfuse.evaluation.task_files import Question, Request, Task, find_task_files, read_task
from headfuse.evaluation.tasks import evaluate_tasks, find_tasks, summarize
from pico import logits_of, pico
from tiny_tokenizer import BOS, VOCABULARY, tiny_tokenizer


@pytest.fixture(scope="module")
def model():
    return pico("llama", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def oe_eval_row(doc, idx, label, continuation, context="Question: which?\nAnswer:"):
    return {"doc_id": doc, "idx": idx, "label": label, "request": {"context": context, "continuation": continuation}}


CHOICES = [
    oe_eval_row(0, 0, 1, " red"),
    oe_eval_row(1, 0, 0, " the moon", "Question: where?\nAnswer:"),
    oe_eval_row(0, 1, 1, " green and blue"),
    oe_eval_row(1, 1, 0, " here", "Question: where?\nAnswer:"),
    oe_eval_row(1_000_000, 0, 1, " red", "Answer:"),
    oe_eval_row(1_000_000, 1, 1, " green and blue", "Answer:"),
]
CLOZE = [
    oe_eval_row(0, 0, ["signs"], " signs", "I do not care about"),
    oe_eval_row(1, 0, "any", " Shane", "on my own,"),
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def one_by_one(model, tokenizer, request):
    encoded = encode_requests(tokenizer, [request])[0]
    ids, start = torch.tensor([encoded.ids]), encoded.num_context
    log_p = logits_of(model, ids)[0, :-1].double().log_softmax(-1)
    steps = [(log_p[i - 1, token].item(), log_p[i - 1].argmax() == token) for i, token in enumerate(encoded.ids)]
    return sum(value for value, _ in steps[start:]), all(best for _, best in steps[start:])


def test_scores_equal_those_of_one_request_at_a_time(model, tokenizer):
    requests = [Request("a" * (i % 7 + 1), " the" * (i % 5 + 1) + "bcd"[: i % 3]) for i in range(24)]
    contexts = torch.tensor([tokenizer(chr(code))["input_ids"] for code in range(ord("!"), 127)])
    likeliest = logits_of(model, contexts)[:, -1].argmax(-1).tolist()
    pairs = ((chr(code + ord("!")), tokenizer.decode(token)) for code, token in enumerate(likeliest))
    requests.append(next(Request(*pair) for pair in pairs if pair[1].isascii() and pair[1].isalnum()))
    expected = [one_by_one(model, tokenizer, request) for request in requests]
    for batch_tokens in (1, 37, 8192):
        scores = score_requests(model, tokenizer, requests, batch_tokens=batch_tokens)
        for (loglikelihood, is_greedy), score in zip(expected, scores, strict=True):
            assert score.loglikelihood == pytest.approx(loglikelihood, rel=1e-4)
            assert score.is_greedy == is_greedy
        assert scores[-1].is_greedy


def test_logits_exist_only_where_continuations_are_predicted(model, tokenizer):
    requests = [Request("a" * (60 + i % 3), " the" * (1 + i % 2)) for i in range(9)]
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:2]))
    try:
        score_requests(model, tokenizer, requests, batch_tokens=300)
    finally:
        hook.remove()
    assert sum(rows for rows, _ in seen) == len(requests)
    assert all(rows * 60 <= 300 and positions <= 4 for rows, positions in seen)


def test_context_and_continuation_are_tokenised_together(tokenizer):
    def split(context, continuation):
        encoded = encode_requests(tokenizer, [Request(context, continuation)])[0]
        parts = encoded.ids[: encoded.num_context], encoded.ids[encoded.num_context :]
        return [tokenizer.decode(part) for part in parts]

    assert split("see", " the") == ["<s>see", " the"]
    assert split("see ", "the") == ["<s>see", " the"]
    assert split("h", "e") == ["<s>", "he"]
    assert split("", "the") == ["<s>", "the"]


def test_without_a_bos_of_its_own_a_text_starts_with_its_context():
    tokenizer = tiny_tokenizer(adds_bos=False)
    assert encode_requests(tokenizer, [Request("a", " the")])[0].num_context == 1
    assert encode_requests(tokenizer, [Request("", "the")])[0].ids[0] == BOS
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(TextError, match="no bos or eos token"):
        encode_requests(tokenizer, [Request("", "the")])


def test_long_contexts_lose_their_start_with_a_warning(model, tokenizer):
    long, short = Request("b" * 300, " the"), Request("b" * 127, " the")
    with pytest.warns(UserWarning, match="1 of 2 contexts exceed 128 positions"):
        scores = score_requests(model, tokenizer, [long, short])
    ids = [encode_requests(tokenizer, [Request("b", " the")])[0].ids[1]] * 128
    expected = logits_of(model, torch.tensor([ids]))[0, -1].log_softmax(-1)[VOCABULARY - 1]
    assert scores[0].loglikelihood == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(TextError, match="wanted a continuation of at most 128 tokens, got 129"):
        score_requests(model, tokenizer, [Request("a", "b" * 129)])


def test_an_empty_continuation_is_an_error(model, tokenizer):
    with pytest.raises(TextError, match="wanted a continuation of 'a', got an empty string"):
        score_requests(model, tokenizer, [Request("a", "")])


def test_broken_weights_are_an_error(tokenizer):
    model = pico("llama", vocab_size=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="wanted finite logits"):
        score_requests(model, tokenizer, [Request("a", "b")])


def test_oe_eval_rows_are_grouped_and_unconditional_ones_dropped(tmp_path):
    task = read_task(write(tmp_path / "arc_easy" / "rc_0shot" / "requests.jsonl.gz", CHOICES))
    assert task.name == "arc_easy/rc_0shot"
    assert task.has_choices
    assert [[r.continuation for r in q.requests] for q in task.questions] == [
        [" red", " green and blue"],
        [" the moon", " here"],
    ]
    assert [question.gold for question in task.questions] == [1, 0]


def test_oe_eval_rows_with_one_choice_are_continuations_whatever_their_label(tmp_path):
    task = read_task(write(tmp_path / "lambada.jsonl", CLOZE))
    assert task == Task(
        "lambada",
        (Question((Request("I do not care about", " signs"),), 0), Question((Request("on my own,", " Shane"),), 0)),
    )
    assert not task.has_choices


def test_plain_rows_get_one_space_between_context_and_choice(tmp_path):
    rows = [
        {"context": "2 + 2 =", "choices": ["4", " 5"], "label": 0},
        {"context": "2 + 2 = ", "choices": ["4", "5"], "label": 1},
    ]
    task = read_task(write(tmp_path / "sums.jsonl.gz", rows))
    assert task.name == "sums"
    assert [r.context + r.continuation for q in task.questions for r in q.requests] == ["2 + 2 = 4", "2 + 2 = 5"] * 2


GOOD = {"context": "a", "choices": ["b", "c"], "label": 0}
BAD_TASKS = {
    "empty": (b"", "wanted task rows, got an empty file"),
    "no json": (b"{", ":1: wanted JSON lines"),
    "no utf-8": (b"\xff", "wanted JSON lines"),
    "a list": (b"[1]", "wanted a JSON object a line, got list"),
    "no label": ([{"context": "a", "choices": ["b"]}], "fields context, choices and label .*, got none called label;"),
    "no strings": ([{"context": "a", "choices": [1, 2], "label": 0}], "got int for a string"),
    "label too large": ([GOOD | {"label": 2}], "wanted a label from 0 to 1, got 2"),
    "label a string": ([GOOD | {"label": "0"}], "wanted a label from 0 to 1, got '0'"),
    "mixed": ([GOOD, GOOD | {"choices": ["b"]}], "wanted one kind of question"),
    "no idx": ([{"doc_id": 0, "request": {"context": "a", "continuation": "b"}}], "wanted doc_id, idx, label"),
    "choice missing": ([CHOICES[0], CHOICES[1], CHOICES[3]], "choices 0..n-1 of doc_id 0|one kind of question"),
    "choice twice": ([CHOICES[0], CHOICES[0]], r"wanted choices 0..n-1 of doc_id 0, got \[0, 0\]"),
    "label of choices no number": ([oe_eval_row(0, 0, ["x"], " a"), oe_eval_row(0, 1, ["x"], " b")], "wanted a label"),
    "only unconditional": (CHOICES[4:], "wanted requests with a context"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_bad_task_file_is_an_error(tmp_path, case):
    content, message = BAD_TASKS[case]
    path = tmp_path / "task.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    with pytest.raises(TextError, match=message) as caught:
        read_task(path)
    assert "\n" not in str(caught.value)


def test_a_broken_gzip_file_is_an_error(tmp_path):
    whole = write(tmp_path / "a.jsonl.gz", CHOICES).read_bytes()
    for content in (whole[:40], b"no gzip"):
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(TextError, match="wanted JSON lines"):
            read_task(tmp_path / "a.jsonl.gz")


def test_task_files_are_found_by_path_and_names_are_left_to_the_harness(tmp_path, monkeypatch):
    first = write(tmp_path / "a" / "rc" / "requests.jsonl.gz", CHOICES)
    second = write(tmp_path / "b" / "bpb" / "requests.jsonl.gz", CLOZE)
    assert find_task_files(str(tmp_path)) == [first, second]
    assert find_task_files(str(second)) == [second]
    assert find_task_files("hellaswag") == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none").mkdir()
    for spec, message in (
        (tmp_path / "none", "wanted requests.jsonl.gz below this folder"),
        (tmp_path / "absent.jsonl", "got no such file"),
        ("hellaswag.jsonl", "got no such file"),
        (write(tmp_path / "task.json", [GOOD]), "wanted a task file \\(.jsonl or .jsonl.gz\\), got another"),
        (write(tmp_path / "task.csv", [GOOD]).name, "convert it to .jsonl"),
    ):
        with pytest.raises(TextError, match=message):
            find_task_files(str(spec))


def test_accuracies_follow_from_the_scores():
    def question(gold, *choices):
        return Question(tuple(Request("q", choice) for choice in choices), gold)

    task = Task("t", (question(0, " aa", " bbbb"), question(1, " aa", " bbbb"), question(1, " é", " f")))
    scores = [Score(value, False) for value in (-2.0, -3.0, -2.0, -3.0, -5.0, -3.0)]
    found = summarize(task, scores)
    # First question: -2 beats -3, but -3/4 beats -2/2 a byte; in the third -5/2 beats -3/1.
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_per_byte"] == pytest.approx(1 / 3)
    assert found["accuracy_stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert found["nll"] == pytest.approx(8 / 3)
    assert found["bits_per_byte"] == pytest.approx(8 / 0.6931471805599453 / (3 + 5 + 2))


def test_local_tasks_run_from_a_folder_and_the_report_is_json(tmp_path, model, tokenizer):
    write(tmp_path / "arc_easy" / "rc_0shot" / "requests.jsonl.gz", CHOICES)
    write(tmp_path / "lambada" / "bpb_0shot" / "requests.jsonl.gz", CLOZE)
    results = evaluate_tasks(model, tokenizer, find_tasks([str(tmp_path)]))
    assert {name: found["questions"] for name, found in results.items()} == {
        "arc_easy/rc_0shot": 2,
        "lambada/bpb_0shot": 2,
    }
    assert "accuracy_per_byte" not in results["lambada/bpb_0shot"]
    exact = [
        one_by_one(model, tokenizer, q.requests[0]) for q in read_task(next(tmp_path.rglob("lambada/*/*.gz"))).questions
    ]
    assert results["lambada/bpb_0shot"]["nll"] == pytest.approx(-sum(value for value, _ in exact) / 2, rel=1e-4)
    assert evaluate_tasks(model, tokenizer, find_tasks([str(tmp_path)]), limit=1)["arc_easy/rc_0shot"]["questions"] == 1
    EvaluationReport(model="m", tasks=results).save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {"model": "m", "tasks": results}
    with pytest.raises(ValueError, match="not JSON compliant"):
        EvaluationReport(model="m", text={"kl": float("nan")}).save(tmp_path / "nan.json")


def test_named_tasks_without_the_extra_are_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        ConfigError, match=r"wanted hellaswag from lm-evaluation-harness.*pip install 'headfuse\[eval\]'"
    ):
        find_tasks(["hellaswag"])


def fake_harness(monkeypatch):
    calls = []

    def simple_evaluate(**options):
        calls.append(options)
        return {"results": {"hellaswag": {"alias": "hellaswag", "acc,none": 0.5, "acc_norm,strict": 0.25, "n": "N/A"}}}

    manager = SimpleNamespace(match_tasks=lambda names: [name for name in names if name == "hellaswag"])
    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **options: options},
        "lm_eval.tasks": {"TaskManager": lambda: manager},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_named_tasks_go_to_the_harness_and_come_back_as_numbers(monkeypatch, model, tokenizer):
    calls = fake_harness(monkeypatch)
    assert evaluate_tasks(model, tokenizer, find_tasks(["hellaswag"]), limit=7) == {
        "hellaswag": {"acc": 0.5, "acc_norm,strict": 0.25}
    }
    assert calls[0]["model"]["pretrained"] is model
    assert calls[0]["tasks"] == ["hellaswag"]
    assert calls[0]["limit"] == 7


def test_a_name_that_the_harness_does_not_know_is_an_error(monkeypatch):
    fake_harness(monkeypatch)
    with pytest.raises(ConfigError, match="got helloswag; list the names with"):
        find_tasks(["hellaswag", "helloswag"])
