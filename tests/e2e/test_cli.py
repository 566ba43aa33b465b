"""The small verbs from end to end on a tiny model, and what the command line says of itself."""

import json
import subprocess
import sys

import numpy as np
import pytest

from command_line import assert_refused
from pico import tokens
from tiny_tokenizer import tiny_tokenizer

MEASURE = ("--tokens", "128", "--length", "32", "--precision", "fp32")


def test_evaluation_is_one_json_object(run, convert, model, text, tmp_path):
    assert convert("--kv", "50%").code == 0
    measure = ("--text", text, *MEASURE)
    outcome = run("eval", tmp_path / "out", "--against", model, *measure, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["cache"]["measured_bytes_per_token"] == found["cache"]["computed_bytes_per_token"]
    assert {"cross_entropy", "kl", "top1_agreement", "reference_cross_entropy"} <= set(found["text"])
    table = run("eval", model, "--against", model, *measure, "--max-delta-ce", "0.001")
    assert table.code == 0, table.err
    assert "KL to original" in table.out


def test_unasked_a_short_text_is_read_whole(run, model, text):
    outcome = run("eval", model, "--text", text, "--length", "32", "--precision", "fp32", "--json")
    assert outcome.code == 0, outcome.err
    assert 0 < json.loads(outcome.out)["text"]["tokens"] < 65_536
    assert_refused(run("eval", model, "--text", text, "--length", "32", "--tokens", "65536"), "ask for fewer tokens")


def test_rows_are_as_long_as_the_model_has_positions_and_no_longer(run, model, text):
    measure = ("--text", text, "--precision", "fp32", "--tokens", "256", "--json")
    assert json.loads(run("eval", model, *measure).out)["text"]["tokens"] == 2 * 127
    assert_refused(run("eval", model, *measure, "--length", "129"), "at most the model's 128 positions, got 129")


def test_a_model_with_another_tokenizer_is_no_original(run, model, damaged):
    tiny_tokenizer(adds_bos=False).save_pretrained(damaged)
    assert_refused(run("eval", model, "--against", damaged, *MEASURE), "damaged: wanted a model with the tokenizer of")


def test_a_failed_gate_is_exit_status_one(run, convert, model, text, tmp_path):
    assert convert("--kv", "25%", "--method", "mean-pool").code == 0
    measure = ("--text", text, *MEASURE, "--json")
    outcome = run("eval", tmp_path / "out", "--against", model, *measure, "--max-delta-ce", "-100")
    assert outcome.code == 1
    assert json.loads(outcome.out)["text"]
    assert outcome.err.splitlines()[-1].startswith("headfuse: gate failed")
    assert_refused(run("eval", tmp_path / "out", "--max-delta-ce", "1"), "--against")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (None, ("no such file",)),
        ('{"question": "a"}', ("tasks.jsonl:1: wanted the fields context, choices and label",)),
        ('{"context": "a", "choices": ["b", "c"], "label": 2}', ("wanted a label from 0 to 1, got 2",)),
    ],
    ids=str,
)
def test_tasks_that_cannot_run_are_refused_before_anything_is_measured(run, model, tmp_path, line, words):
    tasks = tmp_path / "tasks.jsonl"
    if line is not None:
        tasks.write_text(line + "\n")
    assert_refused(run("eval", model, *MEASURE, "--tasks", tasks), *words)


def test_tasks_without_a_tokenizer_are_refused_before_anything_is_measured(run, damaged, tmp_path):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    np.save(tmp_path / "ids.npy", tokens(1, 600)[0].numpy())
    (tmp_path / "tasks.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "label": 1}\n')
    measure = ("--text", tmp_path / "ids.npy", *MEASURE)
    assert run("eval", damaged, *measure).code == 0
    assert_refused(run("eval", damaged, *measure, "--tasks", tmp_path / "tasks.jsonl"), "tasks want a tokenizer")


def test_text_is_generated(run, model):
    outcome = run("generate", model, "--prompt", "the cat", "--max-new-tokens", "4")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("the cat")
    as_json = json.loads(run("generate", model, "--prompt", "the cat", "--max-new-tokens", "4", "--json").out)
    assert as_json["prompt"] + as_json["text"] == outcome.out.removesuffix("\n")


def test_a_model_is_described(run, model):
    found = json.loads(run("inspect", model, "--json").out)
    assert found["family"] == "llama"
    assert found["key_heads"] == [4, 4]
    table = run("inspect", model).out
    assert "KV cache" in table
    assert all(f"  {heads}  " in table for heads in ("4 + 4", "2 + 2", "1 + 1", "0.5 + 0.5"))


def test_help_is_printed(run):
    outcome = run("--help")
    assert outcome.code == 0
    assert "convert" in outcome.out


def test_a_warning_is_one_line():
    code = "import warnings, headfuse.cli as cli; cli.app = lambda **_: warnings.warn('one\\n two'); cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: one two\n"
