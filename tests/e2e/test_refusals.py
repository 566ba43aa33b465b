"""What `headfuse convert` refuses, in one line and without leaving anything behind."""

import json
import shutil
from collections import namedtuple
from contextlib import contextmanager

import pytest
from outcomes import assert_nothing_written
from safetensors.torch import load_file

from command_line import assert_refused
from headfuse import progress
from headfuse.folder import SPARE_BYTES
from pico import pico
from tiny_tokenizer import VOCABULARY
from weight_folders import KEY, WEIGHTS, as_pickle, edit_config, edit_weights

DiskUsage = namedtuple("DiskUsage", "total used free")


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
        (("--kv-heads", "2", "--budget", "adaptive"), "numbers of heads"),
        (("--kv", "25%", "--key-heads", "2"), "wanted --kv or --key-heads, got both"),
        (("--kv-heads", "2", "--kv", "25%"), "wanted --kv or --kv-heads, got both"),
        (("--kv", "25%", "--plan", "plan.json"), "wanted --kv or --plan, got both"),
        (("--value-heads", "2", "--plan", "plan.json"), "wanted --value-heads or --plan, got both"),
        (
            ("--method", "svd"),
            "wanted a method, got 'svd'; choose one of mean-pool, procrustes, closed-form, dha, align",
        ),
        (("--calibration", "no-such-owner/no-such-data"), "no-such-data"),
        (("--calibration", "absent.txt"), "no such file"),
        (("--calibration-tokens", "100M"), "text.txt"),
        (("--calibration-tokens", "0"), "number of tokens"),
        (("--calibration-tokens", "many"), "number of tokens"),
        (("--calibration-tokens", "8"), "at least one row"),
        (("--length", "129"), "at most the model's 128 positions, got 129"),
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


def test_options_that_no_stage_would_read_are_refused_in_one_line(convert, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: absent.txt\ntokens: 1M\nlm-weight: 0.0\nfusion-share: 0.3\ncriterion: dist\n")
    wanted = (
        "--criterion (of procrustes)",
        "--data, --tokens, --lm-weight (of dha and align)",
        "--fusion-share (of dha)",
    )
    assert_refused(convert("--recipe", recipe), "that method closed-form reads", *wanted)
    recipe.unlink()
    assert_refused(convert("--init", "delta", "--no-repeat"), "--init, --repeat (of dha and align)")
    assert_refused(convert("--restore-norm"), "--restore-norm (of mean-pool and procrustes)")
    assert_refused(convert("--method", "mean-pool", "--group-on", "key"), "mean-pool", "--group-on (of procrustes)")
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "mha"), ("'--target'", "'gqa', 'dha'")),
        (("--row-length", "1"), ("'--row-length'",)),
        (("--seed", "99999999999999999999"), ("'--seed'",)),
        (("--seed", "-1"), ("'--seed'",)),
        (("--no-such-option",), ("--no-such-option",)),
        (("--data",), ("'--data' requires an argument",)),
        (("one-too-many",), ("one-too-many",)),
    ],
    ids=str,
)
def test_a_usage_error_is_one_line(convert, tmp_path, arguments, words):
    assert_refused(convert(*arguments), *words, "--help`")
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "word"), [(("convert",), "'model'"), (("frob",), "'frob'"), (("--frob",), "--frob")], ids=str
)
def test_a_usage_error_before_a_command_is_one_line(run, arguments, word):
    assert_refused(run(*arguments), word, "--help`")


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


def test_the_current_folder_is_no_output(convert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(convert(out="."), "got the current one")
    assert_nothing_written(tmp_path)


def test_an_output_may_be_at_home(convert, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = convert("--json", out="~/out")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["out"] == str(tmp_path / "out")


def test_a_full_disk_is_noticed_first(convert, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 10**9 - 1000, 1000))
    assert_refused(convert(), "disk")
    assert_nothing_written(tmp_path)


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
