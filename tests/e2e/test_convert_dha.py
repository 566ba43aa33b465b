"""`headfuse convert --method dha` from end to end on a tiny model."""

import json

import pytest
import torch
from outcomes import assert_complete, assert_nothing_written
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from command_line import assert_refused
from headfuse import progress
from headfuse.evaluation.cache_bytes import measured_cache_bytes
from headfuse.planning.plan import HeadPlan, LayerPlan
from pico import pico
from short_runs import stopping
from tiny_tokenizer import VOCABULARY, tiny_tokenizer
from weight_folders import WEIGHTS

TRAIN = ("--method", "dha", "--tokens", "2k", "--rows", "4", "--row-length", "32", "--repeat")
LEARN = (*TRAIN, "--kv", "50%")
DELTA = ("--init", "delta", "--search-share", "0.2", "--fusion-share", "0.3")


@pytest.mark.parametrize("options", [(), DELTA, ("--init", "mean-pool", "--target", "gqa", "--fusion-share", "0.2")])
def test_training_is_a_part_of_the_conversion(convert, tmp_path, options):
    outcome = convert(*LEARN, *options, "--json")
    assert outcome.code == 0, outcome.err
    done, out = json.loads(outcome.out), tmp_path / "out"
    plan = assert_complete(out, done, "gqa" if "gqa" in options else "dha")
    assert plan.cached_heads() == 8
    assert "dha" in (out / "README.md").read_text()
    assert sum(report["tokens"] for report in done["training"].values()) <= 2048
    for stage in done["training"]:
        rows = (out / "headfuse" / f"{stage}.jsonl").read_text().splitlines()
        assert len(rows) == done["training"][stage]["steps"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert measured_cache_bytes(loaded) == done["kv_bytes_per_token"]["after"]


def test_people_see_what_was_trained(convert):
    outcome = convert(*LEARN)
    assert outcome.code == 0, outcome.err
    assert "healing      2,048 tokens, loss " in outcome.out


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--lm-weight", "2"), "lm_weight from 0 to 1"),
        (("--tokens", "1M", "--no-repeat"), "--repeat"),
        (("--tokens", "10"), "at least one step"),
        (("--row-length", "200", "--rows", "1"), "128 positions"),
        (
            ("--init", "svd"),
            "wanted a start for method dha, got 'svd'; choose one of mean-pool, procrustes, closed-form, delta",
        ),
        (("--search-share", "0.1"), "wanted no search"),
        ((*DELTA, "--search-share", "0"), "wanted a search"),
        ((*DELTA, "--search-share", "0.9"), "from 0 to 1 together"),
        ((*DELTA, "--target", "gqa"), "wanted target dha"),
        (("--data", "absent.txt"), "no such file"),
    ],
    ids=str,
)
def test_training_that_cannot_be_is_refused_in_one_line(convert, tmp_path, options, word):
    assert_refused(convert(*LEARN, *options), word)
    assert_nothing_written(tmp_path)


def test_numbers_of_heads_are_refused_where_a_search_finds_the_groups(convert, tmp_path):
    assert_refused(convert(*TRAIN, *DELTA, "--key-heads", "2"), "numbers of heads")
    assert_nothing_written(tmp_path)


def test_a_plan_is_refused_where_a_search_finds_the_groups(convert, tmp_path):
    assert convert("--kv", "50%", out=tmp_path / "first").code == 0
    plan = tmp_path / "first" / "headfuse" / "plan.json"
    assert_refused(convert(*TRAIN, *DELTA, "--plan", plan), "no plan")
    assert_nothing_written(tmp_path)
    assert convert(*TRAIN, "--plan", plan).code == 0


def test_keys_that_a_norm_ties_together_are_refused_before_any_work(convert, tmp_path):
    pico("olmo2", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for options in (DELTA, ("--fusion-share", "0.2")):
        assert_refused(convert(*LEARN, *options, source=tmp_path / "model"), "key norm over all heads")
        assert_nothing_written(tmp_path)


@pytest.fixture
def interrupted(convert, monkeypatch):
    """The outcome of a conversion that was stopped between two checkpoints of its healing."""

    def command(*options):
        with monkeypatch.context() as patch:
            stages = stopping(7, step_tokens=128, name="healing", error=KeyboardInterrupt)
            patch.setattr(progress, "for_terminal", lambda: stages)
            return convert(*options)

    return command


def test_a_conversion_that_was_interrupted_in_training_is_resumed(convert, interrupted, tmp_path):
    learn = (*LEARN, "--save-every", "5")
    outcome = interrupted(*learn)
    assert outcome.code == 130
    assert outcome.err.startswith("headfuse: interrupted; the run is kept in ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.run"]
    changed = convert(*learn, "--rate", "1e-2")
    assert_refused(changed, "rate: 0.0003 -> 0.01", quiet=False)
    assert convert(*learn).code == 0
    assert convert(*learn, out=tmp_path / "whole").code == 0
    found, wanted = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "whole"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (tmp_path / "out.run").exists()


@pytest.fixture
def another(text, tmp_path):
    """What a run may be resumed with by mistake: a model of the same shape, a text, a plan; beside the first plan."""
    folder = tmp_path / "another"
    model = pico("llama", vocab_size=VOCABULARY, bos_token_id=0)
    model.lm_head.weight.data += 0.1
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(text.read_text().replace("cat", "other"))
    for name, key_map in (("first.json", (0, 0, 1, 1)), ("plan.json", (0, 1, 0, 1))):
        layers = (LayerPlan(key_map=key_map, value_map=(0, 1, 1, 0)),) * 2
        HeadPlan(target="dha", head_dim=8, layers=layers).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("source", "model", "model.sample"),
        ("--data", "text.txt", "text"),
        ("--calibration", "text.txt", "calibration"),
        ("--plan", "plan.json", "plan"),
        ("--refit", None, "settings.refit.steps"),
        ("--lm-weight", 0.5, "learning.lm_weight"),
    ],
)
def test_a_run_is_not_resumed_into_another_model(convert, interrupted, another, text, option, value, word):
    learn = (*TRAIN, "--save-every", "5", "--data", text, "--plan", another / "first.json")
    assert interrupted(*learn).code == 130
    given = another / value if isinstance(value, str) else value
    if option == "source":
        outcome = convert(*learn, source=given)
    else:
        outcome = convert(*learn, option, *(() if value is None else (given,)))
    assert_refused(outcome, "another recipe", f"{word}: ", quiet=False)
    assert convert(*learn).code == 0
