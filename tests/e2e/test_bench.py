"""`headfuse bench` and `headfuse generate` as a user runs them."""

import json

import pytest

from command_line import assert_refused
from weight_folders import edit_config

SMALL = ("--context", "48", "--batch", "1,2", "--new-tokens", "3", "--precision", "fp32", "--device", "cpu")


@pytest.fixture
def converted(convert, tmp_path):
    assert convert("--kv", "50%").code == 0
    return tmp_path / "out"


def test_a_conversion_is_measured_against_its_original(run, converted, model, tmp_path):
    saved = tmp_path / "bench.json"
    outcome = run("bench", converted, "--against", model, *SMALL, "--save", saved)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split()[:3] == ["context", "batch", "model"]
    assert [line.split()[1:3] for line in lines[1:5]] == [["1", "out"], ["1", "model"], ["2", "out"], ["2", "model"]]
    found = json.loads(saved.read_text())
    assert found.keys() >= {"command", "seed", "versions", "git_commit", "hardware", "copy_gb_s", "load", "device"}
    ours, theirs = found["models"]
    assert (ours["name"], ours["attention"]) == ("out", "headfuse")
    assert (theirs["name"], theirs["attention"]) == ("model", "sdpa")
    assert ours["cache_bytes_per_token"] * 2 == theirs["cache_bytes_per_token"]
    assert [(case["model"], case["batch"]) for case in found["cases"]] == [
        ("out", 1), ("out", 2), ("model", 1), ("model", 2)
    ]  # fmt: skip
    assert all(case["tokens_per_second"] > 0 and case["attention_gb_s"] > 0 for case in found["cases"])
    assert not list(tmp_path.glob("*.part"))


def test_unasked_a_context_is_as_long_as_the_model_has_positions(run, model):
    asked = ("--batch", "1", "--new-tokens", "3", "--no-prefill", "--precision", "fp32", "--device", "cpu", "--json")
    found = json.loads(run("bench", model, *asked).out)
    positions = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    assert [case["context"] for case in found["cases"]] == found["load"]["contexts"] == [positions]


def test_one_model_is_measured_with_random_keys_and_values(run, model):
    outcome = run("bench", model, *SMALL, "--no-prefill", "--attention", "headfuse", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [each["attention"] for each in found["models"]] == ["headfuse"]
    assert all(case["first_token_seconds"] is None for case in found["cases"])
    assert all(case["step_seconds"] > 0 for case in found["cases"])


def test_blocks_are_compiled_on_demand(run, converted, monkeypatch):
    monkeypatch.setattr("headfuse.models.compiled.BACKEND", "aot_eager")
    found = json.loads(run("bench", converted, *SMALL, "--compile", "--json").out)
    assert [case["compiled"] for case in found["cases"]] == [True, True]
    options = ("--prompt", "the cat", "--max-new-tokens", "8", "--precision", "fp32", "--device", "cpu", "--json")
    texts = [json.loads(run("generate", converted, *options, *more).out)["text"] for more in ((), ("--compile",))]
    assert texts[0] == texts[1]


def test_the_same_model_twice_keeps_its_names_apart(run, model):
    found = json.loads(run("bench", model, "--against", model, *SMALL, "--json").out)
    assert [each["name"] for each in found["models"]] == ["model", "model (against)"]


def test_a_context_fits_both_of_two_models_of_one_name(run, model, damaged):
    edit_config(damaged, max_position_embeddings=64)
    other = damaged.rename(damaged.with_name(model.name))
    for pair in ((model, other), (other, model)):
        outcome = run("bench", pair[0], "--against", pair[1], "--context", "100", "--batch", "1")
        assert_refused(outcome, "wanted at most 64 tokens, the model's positions, got 100")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--context", "4k"), ("model: wanted at most 128 tokens", "got 4096 of context")),
        (("--context", "48,few"), ("wanted a number of tokens, got 'few'",)),
        (("--batch", "0"), ("wanted a number of rows, got '0'",)),
        (("--context", "8"), ("wanted contexts of more than 34 tokens",)),
        (("--context", "48", "--attention", "quick"), ("wanted an attention that transformers has", "'quick'")),
        (("--context", "48", "--save", "nowhere/bench.json"), ("nowhere/bench.json: wanted a file in a folder",)),
    ],
)
def test_impossible_measurements_are_refused(run, model, options, words):
    assert_refused(run("bench", model, *options), *words)


def test_a_folder_to_save_in_is_refused_before_anything_is_measured(run, model, tmp_path):
    (tmp_path / "folder").mkdir()
    outcome = run("bench", model, *SMALL, "--save", tmp_path / "folder")
    assert_refused(outcome, "folder: wanted a file to write, got a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_unknown_model_is_refused(run, tmp_path):
    assert_refused(run("bench", tmp_path / "nothing", *SMALL), "nothing")


def test_samples_are_written_with_the_options_of_sampling(run, converted):
    options = ("--prompt", "the cat", "--max-new-tokens", "8", "--precision", "fp32", "--json")
    chance = ("--temperature", "1", "--top-k", "20", "--top-p", "0.9")
    texts = [
        json.loads(run("generate", converted, *options, *chance, "--seed", str(seed)).out)["text"] for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    greedy = json.loads(run("generate", converted, *options).out)["text"]
    assert json.loads(run("generate", converted, *options, "--attention", "sdpa").out)["text"] == greedy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--temperature", "-1"), ("wanted temperature >= 0",)),
        (("--temperature", "1", "--top-k", "0"), ("wanted top-k of at least 1",)),
        (("--temperature", "1", "--top-p", "2"), ("wanted top-p above 0 and at most 1",)),
        (("--max-new-tokens", "500"), ("wanted at most 128 tokens, the model's positions",)),
    ],
)
def test_impossible_samples_are_refused(run, model, options, words):
    assert_refused(run("generate", model, "--prompt", "the cat", *options), *words)
