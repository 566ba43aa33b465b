"""The command line from end to end on a tiny model: what it writes, prints and refuses."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from command_line import assert_refused
from headfuse import progress
from headfuse.evaluation.cache_bytes import measured_cache_bytes
from headfuse.folder import SPARE_BYTES
from headfuse.manifest import Manifest
from headfuse.planning.plan import HeadPlan
from pico import logits_of, pico, tokens
from short_runs import stopping
from tiny_tokenizer import VOCABULARY, tiny_tokenizer

WEIGHTS = "model.safetensors"
KEY = "model.layers.1.self_attn.k_proj.weight"
MEASURE = ("--tokens", "128", "--length", "32", "--precision", "fp32")
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def damaged(model, tmp_path):
    """A copy of the model to damage."""
    return shutil.copytree(model, tmp_path / "damaged")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def assert_nothing_written(tmp_path):
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))]
    assert not left


def assert_complete(out, done, target):
    """Every promised file is there and the cache is as small as was said."""
    plan = HeadPlan.load(out / "headfuse" / "plan.json")
    assert plan.target == target
    manifest = Manifest.load(out / "headfuse" / "manifest.json")
    assert manifest.command[:2] == ("headfuse", "convert")
    assert manifest.source.name == "model"
    parity = json.loads((out / "headfuse" / "parity.json").read_text())
    assert parity == done["parity"]
    assert all(value <= 1e-4 for value in parity.values())
    assert done["kv_bytes_per_token"]["after"] == plan.kv_bytes_per_token(4)
    assert (out / "README.md").is_file()
    assert (out / "tokenizer.json").is_file()
    return plan


def test_gqa_is_a_stock_checkpoint_of_the_promised_size(convert, tmp_path):
    outcome = convert("--target", "gqa", "--kv", "50%", "--json")
    assert outcome.code == 0, outcome.err
    done, out = json.loads(outcome.out), tmp_path / "out"
    assert_complete(out, done, "gqa")
    assert not list(out.glob("*.py"))
    written = json.loads((out / "config.json").read_text())
    assert not {"auto_map", "_name_or_path"} & set(written)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.config.num_key_value_heads == 2
    assert measured_cache_bytes(loaded) == done["kv_bytes_per_token"]["after"]
    assert done["kv_bytes_per_token"]["before"] == 2 * done["kv_bytes_per_token"]["after"]


def test_dha_has_its_own_counts_and_the_promised_size(convert, tmp_path):
    outcome = convert("--kv", "0.375", "--refit", "--json")
    assert outcome.code == 0, outcome.err
    done, out = json.loads(outcome.out), tmp_path / "out"
    plan = assert_complete(out, done, "dha")
    assert plan.cached_heads() == 6
    assert list(out.glob("*.py"))
    loaded = AutoModelForCausalLM.from_pretrained(out)  # registered in this process
    assert measured_cache_bytes(loaded) == done["kv_bytes_per_token"]["after"]
    assert done["refit_error"]["after"] <= done["refit_error"]["before"]


def test_people_get_a_table_and_progress_goes_to_standard_error(convert):
    outcome = convert("--kv", "2x", "--method", "procrustes")
    assert outcome.code == 0, outcome.err
    assert "KV cache" in outcome.out
    assert "(50.0%)" in outcome.out
    assert "statistics" in outcome.err
    assert "statistics: " not in outcome.out


def test_a_full_budget_keeps_the_model(convert, model, tmp_path):
    assert convert("--kv", "100%", "--target", "gqa").code == 0
    same, stock = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "out", model))
    torch.testing.assert_close(logits_of(same, tokens(2, 9)), logits_of(stock, tokens(2, 9)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [("--budget", "adaptive"), ("--key-heads", "1", "--value-heads", "3")], ids=str)
def test_heads_can_be_spread_and_named(convert, options):
    outcome = convert("--kv", "50%", *options, "--json")
    assert outcome.code == 0, outcome.err
    done = json.loads(outcome.out)
    assert sum(done["key_heads"] + done["value_heads"]) == 8


def test_bf16_is_a_way_to_compute(convert):
    outcome = convert("--precision", "bf16", "--refit", "--refit-steps", "1", "--json")
    assert outcome.code == 0, outcome.err


def test_token_files_calibrate_without_a_tokenizer(convert, damaged, tmp_path):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    np.save(tmp_path / "ids.npy", tokens(1, 600)[0].numpy())
    outcome = convert("--calibration", tmp_path / "ids.npy", "--json", source=damaged)
    assert outcome.code == 0, outcome.err


def test_saved_statistics_serve_the_next_budget(convert, tmp_path):
    folder = tmp_path / "statistics"
    first = convert("--kv", "50%", "--statistics", folder)
    again = convert("--kv", "25%", "--statistics", folder, out=tmp_path / "again")
    assert (first.code, again.code) == (0, 0), again.err
    assert "layer-tokens" in first.err
    assert "layer-tokens" not in again.err
    plain = convert("--kv", "25%", out=tmp_path / "plain")
    assert plain.code == 0
    kept, made = (load_file(tmp_path / name / WEIGHTS) for name in ("again", "plain"))
    assert all(torch.equal(kept[name], made[name]) for name in made)


def test_statistics_of_another_model_of_the_same_shape_are_refused(convert, model, tmp_path):
    folder = tmp_path / "statistics"
    assert convert("--statistics", folder).code == 0
    twin = shutil.copytree(model, tmp_path / "twin" / "model")
    edit_weights(twin, lambda weights: [weight.mul_(1.5) for weight in weights.values()])
    refused = convert("--statistics", folder, source=twin, out=tmp_path / "other")
    assert_refused(refused, "another model")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("target", ["dha", "gqa"])
def test_a_plan_can_be_used_again(convert, tmp_path, target):
    assert convert("--target", target, "--kv", "50%").code == 0
    plan = tmp_path / "out" / "headfuse" / "plan.json"
    again = convert("--plan", plan, out=tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "headfuse" / "plan.json").read_text() == plan.read_text()
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def test_a_failed_gate_is_exit_status_one(run, convert, model, text, tmp_path):
    assert convert("--kv", "25%", "--method", "mean-pool").code == 0
    measure = ("--text", text, *MEASURE, "--json")
    outcome = run("eval", tmp_path / "out", "--against", model, *measure, "--max-delta-ce", "-100")
    assert outcome.code == 1
    assert json.loads(outcome.out)["text"]
    assert outcome.err.splitlines()[-1].startswith("headfuse: gate failed")
    assert_refused(run("eval", tmp_path / "out", "--max-delta-ce", "1"), "--against")


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
    assert "KV cache" in run("inspect", model).out


def test_help_is_printed(run):
    outcome = run("--help")
    assert outcome.code == 0
    assert "convert" in outcome.out


def absent(folder):
    shutil.rmtree(folder)


def without_config(folder):
    (folder / "config.json").unlink()


def truncated(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-500])


def missing_shard(folder):
    (folder / WEIGHTS).unlink()
    pico("llama", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def nan_weights(folder):
    edit_weights(folder, lambda weights: weights[KEY].fill_(float("nan")))


def other_shape(folder):
    edit_config(folder, num_key_value_heads=2)


def more_layers(folder):
    edit_config(folder, num_hidden_layers=3)


def unknown_family(folder):
    edit_config(folder, model_type="bloom")


def unheard_of_family(folder):
    edit_config(folder, model_type="gpt17")


def as_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (absent, "damaged"),
        (without_config, "config.json"),
        (truncated, "truncated"),
        (missing_shard, "missing"),
        (nan_weights, "NaN"),
        (other_shape, "k_proj"),
        (more_layers, "layer"),
        (unknown_family, "bloom"),
        (unheard_of_family, "gpt17"),
        (as_pickle, "--allow-pickle"),
    ],
)
def test_a_bad_model_is_refused_in_one_line(convert, damaged, tmp_path, damage, word):
    damage(damaged)
    assert_refused(convert(source=damaged), word)
    assert_nothing_written(tmp_path)


def test_a_pickle_is_accepted_on_demand(convert, damaged):
    as_pickle(damaged)
    outcome = convert("--allow-pickle", source=damaged)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--kv", "0"), "above zero"),
        (("--kv", "150%"), "at most 100%"),
        (("--kv", "half"), "wanted a budget"),
        (("--kv", "10%"), "smallest budget"),
        (("--kv", "75%", "--target", "gqa"), "reachable budgets"),
        (("--kv", "50%", "--target", "gqa", "--budget", "adaptive"), "uniform"),
        (("--key-heads", "0"), "ask for 1 up to"),
        (("--method", "svd"), "closed-form"),
        (("--calibration", "no-such-owner/no-such-data"), "no-such-data"),
        (("--calibration", "absent.txt"), "no such file"),
        (("--calibration-tokens", "100M"), "text.txt"),
        (("--calibration-tokens", "0"), "number of tokens"),
        (("--calibration-tokens", "many"), "number of tokens"),
        (("--calibration-tokens", "8"), "at least one row"),
        (("--length", "1"), "at least 2 tokens"),
        (("--length", "-5"), "at least 2 tokens"),
        (("--device", "banana"), "banana"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--plan", "absent.json"), "head plan"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_in_one_line(convert, tmp_path, options, word):
    assert_refused(convert(*options), word)
    assert_nothing_written(tmp_path)


def test_a_conversion_by_many_processes_is_refused(convert, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = convert()
    assert_refused(outcome, "wanted one process to convert, got 2", "`headfuse heal` under it")
    assert_nothing_written(tmp_path)


def test_an_empty_text_is_refused(convert, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert_refused(convert("--calibration", tmp_path / "empty.txt"), "wanted some text")
    assert_nothing_written(tmp_path)


def test_a_plan_of_another_model_is_refused(convert, tmp_path):
    (tmp_path / "plan.json").write_text(
        '{"target": "dha", "head_dim": 8, "layers": [{"key_map": [0], "value_map": [0]}]}'
    )
    assert_refused(convert("--plan", tmp_path / "plan.json"), "plan of this model", quiet=False)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("arguments", [("--target", "mha"), ("--budget", "huge"), ("--no-such-option",)], ids=str)
def test_a_usage_error_is_exit_status_two(convert, tmp_path, arguments):
    outcome = convert(*arguments)
    assert outcome.code == 2
    assert outcome.err
    assert_nothing_written(tmp_path)


def test_a_taken_output_is_kept_unless_told(convert, model, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(model, out)
    (out / "notes.txt").write_text("mine")
    assert_refused(convert(), "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    outcome = convert("--overwrite")
    assert outcome.code == 0, outcome.err
    assert not (out / "notes.txt").exists()
    assert (out / "headfuse" / "plan.json").is_file()


def test_the_model_itself_is_no_output(convert, damaged):
    before = sorted(path.name for path in damaged.iterdir())
    assert_refused(convert("--overwrite", source=damaged, out=damaged), "separate folders")
    assert sorted(path.name for path in damaged.iterdir()) == before


def test_a_full_disk_is_noticed_first(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 10**9 - 1000, 1000))
    assert_refused(convert(), "disk")
    assert_nothing_written(tmp_path)


def test_a_warning_is_one_line():
    code = "import warnings, headfuse.cli as cli; cli.app = lambda **_: warnings.warn('one\\n two'); cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: one two\n"


@pytest.mark.parametrize("pickled", [False, True])
def test_a_disk_must_have_room_for_the_weights_of_any_format(convert, damaged, tmp_path, monkeypatch, pickled):
    weights = sum(tensor.nbytes for tensor in load_file(damaged / WEIGHTS).values())
    if pickled:
        as_pickle(damaged)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 0, SPARE_BYTES + weights - 1))
    assert_refused(convert("--allow-pickle", source=damaged), "disk")
    assert_nothing_written(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 0, SPARE_BYTES + weights + 10_000))
    assert convert("--allow-pickle", source=damaged).code == 0


@pytest.mark.parametrize("stage", ["statistics", "grouping", "refit"])
def test_an_interruption_leaves_nothing_behind(convert, tmp_path, monkeypatch, stage):
    @contextmanager
    def interrupted(name, total, unit):
        def advance(amount):
            if name.startswith(stage):
                raise KeyboardInterrupt

        yield advance

    monkeypatch.setattr(progress, "for_terminal", lambda: interrupted)
    outcome = convert("--refit")
    assert outcome.code == 130
    assert outcome.err == "headfuse: interrupted; nothing was left behind\n"
    assert_nothing_written(tmp_path)


def test_weights_wider_than_the_configuration_says_are_rounded(convert, damaged, tmp_path):
    edit_config(damaged, dtype="bfloat16")
    outcome = convert("--json", "--kv", "50%", source=damaged)
    assert outcome.code == 0, outcome.err
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads(outcome.out)["kv_bytes_per_token"]["before"] == 2 * 2 * 4 * 8 * 2


LEARN = ("--method", "dha", "--kv", "50%", "--tokens", "2k", "--rows", "4", "--row-length", "32", "--repeat")
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
        (("--init", "svd"), "closed-form"),
        (("--search-share", "0.1"), "wanted no search"),
        ((*DELTA, "--search-share", "0"), "wanted a search"),
        ((*DELTA, "--search-share", "0.9"), "from 0 to 1 together"),
        ((*DELTA, "--target", "gqa"), "wanted target dha"),
        ((*DELTA, "--key-heads", "2"), "numbers of heads"),
        (("--data", "absent.txt"), "no such file"),
    ],
    ids=str,
)
def test_training_that_cannot_be_is_refused_in_one_line(convert, tmp_path, options, word):
    assert_refused(convert(*LEARN, *options), word)
    assert_nothing_written(tmp_path)


def test_a_plan_is_refused_where_a_search_finds_the_groups(convert, tmp_path):
    assert convert("--kv", "50%", out=tmp_path / "first").code == 0
    plan = tmp_path / "first" / "headfuse" / "plan.json"
    assert_refused(convert(*LEARN, *DELTA, "--plan", plan), "no plan")
    assert_nothing_written(tmp_path)
    assert convert(*LEARN, "--plan", plan).code == 0


def test_keys_that_a_norm_ties_together_are_refused_before_any_work(convert, tmp_path):
    pico("olmo2", vocab_size=VOCABULARY, bos_token_id=0).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for options in (DELTA, ("--fusion-share", "0.2")):
        assert_refused(convert(*LEARN, *options, source=tmp_path / "model"), "key norm over all heads")
        assert_nothing_written(tmp_path)


def test_a_conversion_that_was_interrupted_in_training_is_resumed(convert, tmp_path, monkeypatch):
    learn = (*LEARN, "--save-every", "5")
    with monkeypatch.context() as patch:
        stages = stopping(7, step_tokens=128, name="healing", error=KeyboardInterrupt)
        patch.setattr(progress, "for_terminal", lambda: stages)
        outcome = convert(*learn)
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
