"""`headfuse convert` from end to end on a tiny model: what it writes and prints."""

import json
import shutil

import numpy as np
import pytest
import torch
from outcomes import assert_complete
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from command_line import assert_refused
from headfuse.evaluation.cache_bytes import measured_cache_bytes
from pico import logits_of, tokens
from weight_folders import WEIGHTS, edit_config, edit_weights


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


@pytest.mark.parametrize(
    "options", [("--kv", "50%", "--budget", "adaptive"), ("--key-heads", "1", "--value-heads", "3")], ids=str
)
def test_heads_can_be_spread_and_named(convert, options):
    outcome = convert(*options, "--json")
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


def test_weights_wider_than_the_configuration_says_are_rounded(convert, damaged, tmp_path):
    edit_config(damaged, dtype="bfloat16")
    outcome = convert("--json", "--kv", "50%", source=damaged)
    assert outcome.code == 0, outcome.err
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads(outcome.out)["kv_bytes_per_token"]["before"] == 2 * 2 * 4 * 8 * 2
