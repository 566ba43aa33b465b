"""The one pass: moments by their definition, saved for exactly the model and text that they belong to."""

import json
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.registry import adapter_for
from headfuse.errors import ConfigError
from headfuse.statistics import collect as module
from headfuse.statistics.collect import collect, layer_statistics, load_statistics, memory_needed, save_statistics
from headfuse.statistics.stream import LayerInputs
from pico import pico, tokens
from strategies import head_cases, statistics_of

IDENTITY = {"model": {"name": "pico"}, "text": "abc", "unit_rows": True, "precision": "fp32"}


def inputs_of(x: torch.Tensor) -> LayerInputs:
    hidden = x.view(4, -1, x.shape[-1])
    return LayerInputs(0, hidden, hidden.pow(2).mean(-1), None)


def gathered(family: str, **options):
    model = pico(family)
    loaded = LoadedModel.of(model, adapter_for(model.config))
    return loaded, collect(model, loaded.layers, loaded.heads, tokens(3, 8), **options)


@given(head_cases())
@settings(max_examples=15)
def test_statistics_follow_their_definition(case):
    found = layer_statistics(inputs_of(case.x), case.heads.to(torch.float64), unit_rows=True)
    expected = statistics_of(case.heads, case.x)
    assert_close(found.moment, expected.moment)
    for name in ("unit_values", "unit_key_planes", "unit_key_rest"):  # projected in fp32
        assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-4)


def test_chunks_add_up(monkeypatch):
    _, whole = gathered("llama", unit_rows=True)
    monkeypatch.setattr(module, "ROWS_PER_GRAM", 5)
    _, parts = gathered("llama", unit_rows=True)
    for a, b in zip(whole, parts, strict=True):
        for name, tensor in vars(a).items():
            assert_close(getattr(b, name), tensor, atol=1e-6, rtol=1e-6)


def test_unit_rows_are_gathered_on_demand_only():
    _, statistics = gathered("llama")
    assert len(statistics) == 2
    assert all(entry.moment.dtype == torch.float64 for entry in statistics)
    assert all(entry.unit_values is None and entry.unit_key_planes is None for entry in statistics)


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_statistics_are_as_large_as_announced(family, unit_rows):
    loaded, statistics = gathered(family, unit_rows=unit_rows)
    size = sum(tensor.nbytes for entry in statistics for tensor in vars(entry).values() if tensor is not None)
    assert size == memory_needed(loaded.heads[0], len(loaded.layers), unit_rows=unit_rows)


def test_statistics_are_whole_or_not_there(tmp_path, monkeypatch):
    _, statistics = gathered("llama")
    save_statistics(tmp_path, statistics, IDENTITY)
    before, save, seen = load_statistics(tmp_path, IDENTITY), module.save_file, []

    def failing(tensors, path):
        save(tensors, path)
        path.write_bytes(path.read_bytes()[:-100])
        seen.append(load_statistics(tmp_path, IDENTITY))
        raise OSError("no space left on device")

    monkeypatch.setattr(module, "save_file", failing)
    with pytest.raises(ConfigError, match="no space left"):
        save_statistics(tmp_path, statistics, IDENTITY)
    assert before is not None
    for found in (*seen, load_statistics(tmp_path, IDENTITY)):
        assert all(torch.equal(a.moment, b.moment) for a, b in zip(found, before, strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["statistics.json", "statistics.safetensors"]
    with pytest.raises(ConfigError, match="no space left"):
        save_statistics(tmp_path / "new", statistics, IDENTITY)
    assert load_statistics(tmp_path / "new", IDENTITY) is None


@pytest.mark.parametrize("unit_rows", [False, True])
def test_saved_statistics_come_back_bit_for_bit(tmp_path, unit_rows):
    _, statistics = gathered("phi", unit_rows=unit_rows)
    folder = tmp_path / "new" / "statistics"
    save_statistics(folder, statistics, IDENTITY)
    found = load_statistics(folder, IDENTITY)
    assert found is not None
    for a, b in zip(statistics, found, strict=True):
        for field in fields(a):
            mine, theirs = getattr(a, field.name), getattr(b, field.name)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_a_folder_without_statistics_is_none(tmp_path):
    assert load_statistics(tmp_path / "absent", IDENTITY) is None
    assert load_statistics(tmp_path, IDENTITY) is None


@pytest.mark.parametrize("key", IDENTITY)
def test_statistics_of_something_else_are_refused(tmp_path, key):
    _, statistics = gathered("llama")
    save_statistics(tmp_path, statistics, IDENTITY)
    with pytest.raises(ConfigError, match=f"another {key}") as caught:
        load_statistics(tmp_path, IDENTITY | {key: "other"})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["statistics.json", "statistics.safetensors"])
def test_damaged_statistics_are_refused(tmp_path, name):
    _, statistics = gathered("llama")
    save_statistics(tmp_path, statistics, IDENTITY)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(ConfigError, match="unreadable"):
        load_statistics(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", [[], "text", None])
def test_an_identity_that_is_no_object_is_refused(tmp_path, content):
    _, statistics = gathered("llama")
    save_statistics(tmp_path, statistics, IDENTITY)
    (tmp_path / "statistics.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="unreadable"):
        load_statistics(tmp_path, IDENTITY)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(tmp_path):
    _, statistics = gathered("llama")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        save_statistics(tmp_path / "file", statistics, IDENTITY)
