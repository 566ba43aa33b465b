"""Healing from end to end: what it writes, how it survives a kill and a second process, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import headfuse
from command_line import assert_refused
from headfuse import healing, progress
from headfuse.manifest import Manifest
from headfuse.planning.plan import HeadPlan
from headfuse.training.run_folder import RunFolder
from pico import logits_of, pico, tokens
from short_runs import learnable_tokens, stopping
from tiny_tokenizer import VOCABULARY

ROWS, LENGTH, STEPS = 4, 16, 24
TRAIN = ("--tokens", STEPS * ROWS * LENGTH, "--rows", ROWS, "--row-length", LENGTH, "--precision", "fp32")
TRAIN = (*map(str, TRAIN), "--rate", "1e-2", "--device", "cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def converted(shared_folder):
    """The tiny model with half of its heads, without a refit."""
    np.save(shared_folder / "ids.npy", learnable_tokens(STEPS * ROWS * LENGTH + 1, VOCABULARY))
    headfuse.convert(
        shared_folder / "model",
        shared_folder / "converted",
        headfuse.Settings(share=headfuse.parse_budget("50%"), refit=None),
        headfuse.Calibration(str(shared_folder / "text.txt"), 256, 32),
        placement=headfuse.Placement("cpu", "fp32"),
    )
    return shared_folder / "converted"


@pytest.fixture
def ids(shared_folder):
    return shared_folder / "ids.npy"


@pytest.fixture
def heal(run, converted, model, ids, tmp_path):
    """Heal the converted model into `tmp_path/healed`; more options come last and win."""

    def command(*options, source=converted, out=tmp_path / "healed", teacher=model):
        return run("heal", source, out, "--teacher", teacher, "--data", ids, *TRAIN, *options)

    return command


@pytest.fixture(scope="module")
def whole(shared_folder, converted):
    """The uninterrupted run, one process."""
    out = shared_folder / "whole"
    tokens = {"tokens": STEPS * ROWS * LENGTH, "rows": ROWS, "length": LENGTH}
    options = headfuse.TrainingOptions(**tokens, rate=1e-2, save_every=4)
    placement, teacher = headfuse.Placement("cpu", "fp32"), shared_folder / "model"
    data = str(shared_folder / "ids.npy")
    headfuse.heal(converted, out, teacher=teacher, data=data, options=options, placement=placement)
    return out


def subprocess_of(folder, out, *options):
    arguments = ["heal", folder / "converted", out, "--teacher", folder / "model", "--data", folder / "ids.npy"]
    return [sys.executable, "-m", "headfuse", *map(str, arguments), *TRAIN, "--save-every", "4", *options]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "headfuse" / "healing.jsonl").read_text().splitlines()]


def left_behind(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_a_healed_folder_is_the_converted_one_with_better_weights(heal, converted, tmp_path):
    outcome = heal("--json")
    assert outcome.code == 0, outcome.err
    done, out = json.loads(outcome.out), tmp_path / "healed"
    assert left_behind(tmp_path) == ["healed"]
    assert done["training"]["steps"] == STEPS
    assert done["training"]["tokens"] == STEPS * ROWS * LENGTH
    assert set(done["seconds"]) == {"load", "training", "total"}
    curve = losses(out)
    assert len(curve) == STEPS
    assert sum(curve[-4:]) < 0.9 * sum(curve[:4])
    assert done["training"]["losses"]["loss"] == curve[-1]
    assert HeadPlan.load(out / "headfuse" / "plan.json") == HeadPlan.load(converted / "headfuse" / "plan.json")
    manifest = Manifest.load(out / "headfuse" / "manifest.json")
    assert manifest.source.name == "converted"
    assert manifest.command[:2] == ("headfuse", "heal")
    for file in ("tokenizer.json", *(path.name for path in converted.glob("*.py"))):
        assert (out / file).read_bytes() == (converted / file).read_bytes()
    before, after = load_file(converted / WEIGHTS), load_file(out / WEIGHTS)
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert not all(torch.equal(before[name], after[name]) for name in before)


def test_the_card_says_on_what_a_model_was_healed(heal, converted, model, ids, run, tmp_path):
    assert heal().code == 0
    card, before = (tmp_path / "healed" / "README.md").read_text(), (converted / "README.md").read_text()
    assert card.startswith(before.rstrip())
    line = "Healed: all weights were then trained on 1,536 tokens towards the predictions of `model`."
    assert card.splitlines()[-1] == line
    assert str(model) not in card
    assert run("heal", converted, tmp_path / "alone", "--data", ids, *TRAIN).code == 0
    assert (tmp_path / "alone" / "README.md").read_text().endswith("towards the next token alone.\n")


def test_a_teacher_s_likeliest_tokens_heal_like_the_teacher_and_leave_no_folder(heal, whole, tmp_path):
    done = json.loads(heal("--teacher-top-k", str(VOCABULARY), "--json").out)
    assert done["training"]["losses"]["kl_top_k"] == pytest.approx(losses(whole)[-1], rel=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


@pytest.mark.parametrize(("options", "rows"), [((), ROWS), (("--micro-rows", "2"), 2)])
def test_the_teacher_sees_no_more_rows_at_once_than_the_student(heal, monkeypatch, options, rows):
    seen, record = [], healing.top_k_teacher

    def watched(teacher, *arguments, **named):
        embed = teacher.get_input_embeddings()
        with embed.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))):
            record(teacher, *arguments, **named)

    monkeypatch.setattr(healing, "top_k_teacher", watched)
    assert heal("--teacher-top-k", "4", *options).code == 0
    assert max(seen) == rows


def test_people_get_a_table(heal):
    outcome = heal()
    assert outcome.code == 0, outcome.err
    assert f"{STEPS * ROWS * LENGTH:,} tokens in {STEPS} steps" in outcome.out
    assert "kl " in outcome.out
    assert "healing: " in outcome.err


def test_a_stock_checkpoint_with_fewer_heads_is_healed_too(convert, heal, model, tmp_path):
    assert convert("--target", "gqa", "--kv", "50%", out=tmp_path / "gqa").code == 0
    assert heal("--update", "adamw", source=tmp_path / "gqa").code == 0
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    assert healed.config.num_key_value_heads == 2
    assert not list((tmp_path / "healed").glob("*.py"))


def test_a_killed_run_goes_on_with_the_same_command_and_writes_the_same_bits(shared_folder, whole, tmp_path):
    out = tmp_path / "healed"
    killed = subprocess.Popen(subprocess_of(shared_folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run, deadline = RunFolder(tmp_path / "healed.run"), time.monotonic() + 120
        while run.latest_step() < 8 and killed.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(killed.pid, signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    assert 8 <= run.latest_step() < STEPS
    assert left_behind(tmp_path) == ["healed.run"]
    subprocess.run(subprocess_of(shared_folder, out), check=True, capture_output=True)
    assert left_behind(tmp_path) == ["healed"]
    assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    assert (out / "headfuse" / "healing.jsonl").read_bytes() == (whole / "headfuse" / "healing.jsonl").read_bytes()


def test_two_processes_under_torchrun_write_the_weights_of_one(heal, shared_folder, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    adamw = ("--update", "adamw")
    assert heal(*adamw, out=alone).code == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *subprocess_of(shared_folder, together, *adamw, "--json")[1:]]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["training"]["steps"] == STEPS  # one of the two prints
    assert left_behind(tmp_path) == ["alone", "together"]
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    found, wanted = load_file(together / WEIGHTS), load_file(alone / WEIGHTS)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lm-weight", "2"), ("lm_weight from 0 to 1", "2")),
        (("--tokens", "1M"), ("ids.npy", "--repeat")),
        (("--rows", "200", "--tokens", "2000"), ("at least one step", "2000")),
        (("--rate", "0"), ("rate above zero",)),
        (("--micro-rows", "3"), ("micro_rows to divide",)),
        (("--row-length", "200", "--rows", "1"), ("128 positions",)),
        (("--data", "absent.txt"), ("no such file",)),
        (("--teacher", "absent"), ("absent",)),
        (("--device", "banana"), ("banana",)),
        (("--capture", "--teacher-top-k", "4"), ("--capture or --teacher-top-k",)),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_in_one_line_and_leaves_nothing(heal, tmp_path, options, words):
    assert_refused(heal(*options), *words)
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("options", [("--lm-weight", "0.5"), ("--teacher-top-k", "4")], ids=str)
def test_what_only_a_teacher_gives_a_sense_is_refused_without_one(run, converted, ids, tmp_path, options):
    outcome = run("heal", converted, tmp_path / "healed", "--data", ids, *TRAIN, *options)
    assert_refused(outcome, "wanted a teacher", options[0])
    assert left_behind(tmp_path) == []


def test_a_teacher_with_another_vocabulary_is_refused(heal, tmp_path):
    pico("llama").save_pretrained(tmp_path / "teacher")
    assert_refused(
        heal(teacher=tmp_path / "teacher"), f"wanted a teacher with the student's {VOCABULARY} tokens, got 96"
    )
    assert left_behind(tmp_path) == ["teacher"]


def test_a_taken_output_is_refused_first_and_replaced_on_demand(heal, model, tmp_path):
    (tmp_path / "healed").mkdir()
    (tmp_path / "healed" / "notes.txt").write_text("mine")
    assert_refused(heal(), "--overwrite")
    assert_refused(heal("--overwrite"), "holds none")
    (tmp_path / "healed" / "config.json").write_text("{}")
    assert heal("--overwrite").code == 0
    assert not (tmp_path / "healed" / "notes.txt").exists()


def test_an_output_may_be_at_home_and_its_run_is_beside_it(interrupted, heal, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert interrupted("--save-every", "4", after=6, out="~/healed").code == 130
    assert left_behind(tmp_path) == ["healed.run"]
    assert json.loads(heal("--save-every", "4", "--json", out="~/healed").out)["out"] == str(tmp_path / "healed")


def test_the_current_folder_is_no_output(heal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(heal(out="."), "got the current one")


def test_the_folder_of_the_run_is_no_folder_of_others(heal, converted, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert_refused(heal("--run", tmp_path / "mine"), "got one with notes.txt")
    for place in (tmp_path / "healed", tmp_path / "healed" / "run", converted):
        assert_refused(heal("--run", place), "must be separate")
    assert heal("--run", tmp_path / "deep" / "run").code == 0
    assert left_behind(tmp_path) == ["deep", "healed", "mine"]


@pytest.fixture
def interrupted(heal, tmp_path, monkeypatch):
    """Heal until some steps are done, then Ctrl-C."""

    def command(*options, after, **folders):
        with monkeypatch.context() as patch:
            patch.setattr(progress, "for_terminal", lambda: stopping(after, error=KeyboardInterrupt))
            return heal(*options, **folders)

    return command


def test_an_interruption_before_a_checkpoint_leaves_nothing(interrupted, tmp_path):
    outcome = interrupted(after=3)
    assert (outcome.code, outcome.err) == (130, "headfuse: interrupted; nothing was left behind\n")
    assert left_behind(tmp_path) == []


def test_an_interruption_after_a_checkpoint_says_where_it_is_and_another_recipe_is_refused(
    interrupted, heal, whole, tmp_path
):
    outcome = interrupted("--save-every", "4", after=6)
    assert outcome.code == 130
    kept = f"the run is kept in {tmp_path / 'healed.run'}, from where the same command resumes it"
    assert outcome.err == f"headfuse: interrupted; {kept}\n"
    assert left_behind(tmp_path) == ["healed.run"]
    assert_refused(heal("--rate", "1e-3", "--save-every", "4"), "rate: 0.01 -> 0.001", "delete the folder", quiet=False)
    assert left_behind(tmp_path) == ["healed.run"]
    assert heal("--save-every", "4").code == 0
    assert losses(tmp_path / "healed") == losses(whole)


@pytest.mark.parametrize("changed", ["teacher", "text", "model"])
def test_a_run_is_not_resumed_with_another_model_or_text(heal, interrupted, converted, model, tmp_path, changed):
    assert interrupted("--save-every", "4", after=6).code == 130
    other = shutil.copytree(converted if changed == "model" else model, tmp_path / "other")
    weights = load_file(other / WEIGHTS)
    save_file(weights | {"lm_head.weight": weights["lm_head.weight"] + 0.1}, other / WEIGHTS, {"format": "pt"})
    np.save(tmp_path / "ids.npy", learnable_tokens(STEPS * ROWS * LENGTH + 1, VOCABULARY)[::-1])
    folders = {"teacher": {"teacher": other}, "model": {"source": other}, "text": {}}[changed]
    text = ("--data", tmp_path / "ids.npy") if changed == "text" else ()
    word = "text" if changed == "text" else f"{changed}.sample"
    assert_refused(heal("--save-every", "4", *text, **folders), "another recipe", f"{word}: ", quiet=False)


@pytest.mark.slow
def test_the_demo_model_is_converted_with_training_and_healed(run, tmp_path):
    """With tied embeddings, bf16 weights and a tokenizer pass."""
    out, healed = tmp_path / "out", tmp_path / "healed"
    train = ("--tokens", "4k", "--row-length", "64", "--precision", "fp32", "--json")
    options = ("--method", "dha", "--kv", "25%", "--no-refit", "--calibration-tokens", "4096")
    outcome = run("convert", "demo", out, *options, *train)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["training"]["healing"]["tokens"] == 4096
    outcome = run("heal", out, healed, "--teacher", "demo", *train)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["training"]["tokens"] == 4096
    before, after = load_file(out / WEIGHTS), load_file(healed / WEIGHTS)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(healed)
    assert logits_of(model, tokens(1, 9)).isfinite().all()
    assert losses(healed)[-1] < losses(healed)[0]
