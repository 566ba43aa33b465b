"""Align before merging from the command line: what it writes, how it survives a kill, what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from command_line import assert_refused
from headfuse.planning.plan import HeadPlan, LayerPlan
from headfuse.training.run_folder import RunFolder
from pico import logits_of, pico, tokens
from short_runs import learnable_tokens
from tiny_tokenizer import VOCABULARY, tiny_tokenizer

ROWS, LENGTH, STEPS = 4, 32, 30
TRAIN = ("--tokens", STEPS * ROWS * LENGTH, "--rows", ROWS, "--row-length", LENGTH, "--device", "cpu")
ALIGN = ("--method", "align", "--kv-heads", "2", *map(str, TRAIN), "--repeat")
WEIGHTS = "model.safetensors"
# Loads a folder with transformers alone and prints its class and the logits of a row.
ALONE = """
import importlib.abc, sys

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "headfuse":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nothing())
try:
    import headfuse
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("headfuse is importable")
import json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits
print(json.dumps([type(model).__name__, model.config.num_key_value_heads, logits[0, -1, :8].tolist()]))
"""


@pytest.fixture
def align(convert):
    """Align the tiny model, four heads to two; more options come last and win."""

    def command(*options, **where):
        return convert(*ALIGN, *options, **where)

    return command


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def curve(out, name):
    return [json.loads(line)[name] for line in (out / "headfuse" / "pruning.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options", [(), ("--init", "closed-form", "--refit"), ("--init", "closed-form", "--no-refit")], ids=str
)
def test_the_result_is_a_stock_checkpoint_whose_gates_are_closed(align, model, tmp_path, options):
    outcome = align(*options, "--json")
    assert outcome.code == 0, outcome.err
    done, out = json.loads(outcome.out), tmp_path / "out"
    assert left_behind(tmp_path) == ["out"]
    assert not list(out.glob("*.py"))
    assert done["target"] == "gqa"
    assert done["kv_bytes_per_token"]["before"] == 2 * done["kv_bytes_per_token"]["after"]
    assert all(value <= 1e-4 for value in done["parity"].values())
    assert done["training"]["pruning"]["steps"] == STEPS
    assert curve(out, "share_off")[0] == 0.0
    assert curve(out, "share_off")[24:] == [1.0] * 6
    assert curve(out, "kl")[0] < 1e-3
    plan = HeadPlan.load(out / "headfuse" / "plan.json")
    assert plan.target == "gqa"
    assert plan.cached_heads() == 8
    assert "align" in (out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.num_key_value_heads == 2
    assert logits_of(loaded, tokens(2, 9)).isfinite().all()
    assert load_file(out / WEIGHTS).keys() == load_file(model / WEIGHTS).keys()


def test_a_fresh_process_without_headfuse_loads_the_result(align, tmp_path):
    assert align().code == 0
    row = tokens(1, 9)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out"), json.dumps(row[0].tolist())]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    name, heads, logits = json.loads(done.stdout.splitlines()[-1])
    assert (name, heads) == ("LlamaForCausalLM", 2)
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert logits == pytest.approx(logits_of(here, row)[0, -1, :8].tolist(), abs=1e-5)


def test_people_see_what_was_trained(align):
    outcome = align()
    assert outcome.code == 0, outcome.err
    assert f"pruning      {STEPS * ROWS * LENGTH:,} tokens, loss " in outcome.out
    assert "pruning: " in outcome.err


def test_a_share_of_the_cache_serves_as_well_as_a_number_of_heads(convert, tmp_path):
    options = [option for option in ALIGN if option not in ("--kv-heads", "2")]
    assert convert(*options, "--kv", "50%").code == 0
    assert convert(*ALIGN, out=tmp_path / "again").code == 0
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_another_teacher_is_followed(align, run, model, tmp_path):
    twin = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        twin.get_output_embeddings().weight.mul_(2.0)
    twin.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    assert align("--teacher", tmp_path / "teacher").code == 0
    assert curve(tmp_path / "out", "kl")[0] > 0.05


def test_prompts_and_answers_are_learned_by_their_own_losses(align, tmp_path):
    words = ["cat", "hen", "dog", "cow"]
    lines = [
        {"prompt": f"what is number {i}? answer:", "answer": f" the {words[i % 4]}", "task": "words"} for i in range(64)
    ]
    data = tmp_path / "examples.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)) + "\n")
    outcome = align("--data", data, "--row-length", "64", "--init", "closed-form")
    assert outcome.code == 0, outcome.err
    assert len(curve(tmp_path / "out", "bild")) == STEPS // 2
    assert curve(tmp_path / "out", "kl")[0] < 1e-3
    assert curve(tmp_path / "out", "bild")[0] < 1e-3
    assert curve(tmp_path / "out", "share_off")[-1] == 1.0


def test_a_killed_run_goes_on_with_the_same_command_and_writes_the_same_bits(align, model, text, tmp_path):
    ids = tmp_path / "ids.npy"
    np.save(ids, learnable_tokens(STEPS * ROWS * LENGTH + 1, VOCABULARY))
    data = ("--data", str(ids), "--save-every", "4")
    assert align(*data, out=tmp_path / "whole").code == 0
    small = ("--calibration", str(text), "--calibration-tokens", "256", "--length", "32", "--precision", "fp32")
    arguments = ["convert", str(model), str(tmp_path / "out"), *small, *ALIGN, *data]
    command = [sys.executable, "-m", "headfuse", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    killed = subprocess.Popen(command, **quiet)
    try:
        run, deadline = RunFolder(tmp_path / "out.run" / "pruning"), time.monotonic() + 120
        while run.latest_step() < 8 and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert 8 <= run.latest_step() < STEPS
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr.count("which a killed process left behind") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.npy", "out", "whole"]
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert curve(tmp_path / "out", "loss") == curve(tmp_path / "whole", "loss")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--kv-heads", "3"), ("equal groups of 4", "reachable budgets")),
        (("--kv-heads", "8"), ("the model has 4 and 4",)),
        (("--key-heads", "2"), ("--kv-heads or --key-heads",)),
        (("--target", "dha"), ("wanted target gqa",)),
        (("--budget", "adaptive"), ("uniform",)),
        (("--init", "delta"), ("mean-pool, closed-form",)),
        (("--fusion-share", "0.2"), ("method align (procrustes) reads, got --fusion-share (of dha)",)),
        (("--init", "closed-form", "--criterion", "cos"), ("align (closed-form)", "--criterion (of procrustes)")),
        (("--lm-weight", "2"), ("lm_weight from 0 to 1",)),
        (("--tokens", "1M", "--no-repeat"), ("--repeat",)),
        (("--row-length", "200", "--rows", "1"), ("128 positions",)),
        (("--teacher", "absent"), ("absent",)),
        (("--data", "absent.txt"), ("no such file",)),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_in_one_line_and_leaves_nothing(align, tmp_path, options, words):
    assert_refused(align(*options), *words)
    assert left_behind(tmp_path) == []


def test_a_teacher_with_another_vocabulary_is_refused(align, tmp_path):
    pico("llama").save_pretrained(tmp_path / "teacher")
    assert_refused(align("--teacher", tmp_path / "teacher"), f"student's {VOCABULARY} tokens, got 96")
    assert left_behind(tmp_path) == ["teacher"]


def test_a_teacher_with_another_tokenizer_is_refused(align, model, tmp_path):
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer(adds_bos=False).save_pretrained(tmp_path / "teacher")
    assert_refused(align("--teacher", tmp_path / "teacher"), "teacher with the student's tokenizer, got another")
    assert left_behind(tmp_path) == ["teacher"]


def test_a_teacher_is_refused_where_nothing_would_follow_it(convert, model, tmp_path):
    assert_refused(convert("--teacher", model), "method closed-form reads, got --teacher (of align)")
    assert left_behind(tmp_path) == []


def test_keys_behind_a_norm_are_said_not_to_be_aligned(align, tmp_path):
    pico("qwen3", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.warns(UserWarning, match="qwen3: values are aligned, keys are not") as said:
        outcome = align(source=tmp_path / "model")
    assert outcome.code == 0, outcome.err
    assert len(said) == 1


def test_a_plan_is_obeyed_whatever_the_default_budget(convert, tmp_path):
    # A quarter of three heads is none.
    grouped = pico("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48, vocab_size=VOCABULARY)
    grouped.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    plan = HeadPlan(target="gqa", head_dim=8, layers=(LayerPlan(key_map=(0,) * 6, value_map=(0,) * 6),) * 2)
    plan.save(tmp_path / "plan.json")
    options = [option for option in ALIGN if option not in ("--kv-heads", "2")]
    outcome = convert(*options, "--plan", tmp_path / "plan.json", source=tmp_path / "model")
    assert outcome.code == 0, outcome.err
    assert HeadPlan.load(tmp_path / "out" / "headfuse" / "plan.json") == plan


def test_a_family_without_stock_grouped_queries_is_refused(align, tmp_path):
    pico("gpt2", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert_refused(align(source=tmp_path / "model"), "no grouped-query attention")
    assert left_behind(tmp_path) == ["model"]
