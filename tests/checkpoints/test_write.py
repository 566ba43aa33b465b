"""Folders that headfuse writes load with transformers and carry everything but the source's weights."""

import json

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from headfuse.checkpoints.assembly import decoupled_config, decoupled_model_state, split_model
from headfuse.checkpoints.card import ModelCard, base_licence
from headfuse.checkpoints.loading import load_model, load_tokenizer
from headfuse.checkpoints.registry import adapter_for
from headfuse.checkpoints.source import Source, locate
from headfuse.checkpoints.validation import check_checkpoint, check_weights
from headfuse.checkpoints.write import write_checkpoint
from headfuse.errors import ConfigError
from headfuse.folder import writing
from pico import every_family, logits_of, pico, shared, tokens


@pytest.fixture
def source(tmp_path):
    """A model folder with everything that may stand beside the weights."""
    folder = tmp_path / "source"
    pico("llama").save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}'
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Model")
    (folder / "modeling_mine.py").touch()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


def write(out, model, **options):
    out.mkdir()
    options = {"source": out.parent, "dtype": torch.float32} | options
    write_checkpoint(out, model.state_dict(), model.config, **options)
    return out


@every_family
def test_a_written_model_is_sound_and_computes_the_same(family, tmp_path):
    model = pico(family)
    out = write(tmp_path / "out", model)
    check_checkpoint(out)
    assert torch.equal(logits_of(load_model(out), tokens(2, 7)), logits_of(model, tokens(2, 7)))


@every_family
def test_a_tied_embedding_is_stored_once_under_the_name_of_the_input(family, tmp_path):
    model = pico(family, tie_word_embeddings=True)
    out = write(tmp_path / "out", model)
    stored = load_file(out / "model.safetensors")
    assert not {"lm_head.weight", "embed_out.weight"} & set(stored)
    assert torch.equal(logits_of(load_model(out), tokens(2, 7)), logits_of(model, tokens(2, 7)))


def test_headers_note_nothing_that_varies_from_run_to_run(tmp_path):
    out = write(tmp_path / "out", pico("llama", tie_word_embeddings=True))
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}


def test_a_tied_embedding_stays_tied_in_another_dtype(tmp_path):
    out = write(tmp_path / "out", pico("llama", tie_word_embeddings=True), dtype=torch.bfloat16)
    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(out, dtype=torch.bfloat16).get_output_embeddings().weight.dtype == torch.bfloat16


def test_large_models_are_sharded(tmp_path):
    model = pico("llama")
    out = write(tmp_path / "out", model, max_shard_size="20KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert (out / "model.safetensors.index.json").is_file()
    check_checkpoint(out)
    assert torch.equal(logits_of(load_model(out), tokens(2, 7)), logits_of(model, tokens(2, 7)))


def test_views_are_stored_without_the_storage_behind_them(tmp_path):
    model = pico("llama")
    state = {name: torch.stack([tensor, tensor + 1])[0] for name, tensor in model.state_dict().items()}
    projection = "model.layers.0.mlp.up_proj.weight"
    state[projection] = state[projection].T.contiguous().T
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", state, model.config, source=tmp_path, dtype=torch.float32)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    numbers = sum(tensor.numel() for tensor in state.values())
    assert 4 * numbers < written < 4 * numbers + 10_000
    assert torch.equal(logits_of(load_model(tmp_path / "out"), tokens(2, 7)), logits_of(model, tokens(2, 7)))


def test_integer_tensors_keep_their_type(tmp_path):
    (tmp_path / "out").mkdir()
    state = {"steps": torch.arange(3), "weight": torch.ones(3)}
    write_checkpoint(tmp_path / "out", state, {}, source=tmp_path, dtype=torch.float16)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in stored.items()} == {"steps": torch.int64, "weight": torch.float16}


def test_a_dictionary_serves_as_configuration(tmp_path):
    model = pico("llama")
    config = model.config.to_dict() | {"torch_dtype": "float32"}
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", model.state_dict(), config, source=tmp_path, dtype=torch.float16)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content["dtype"] == "float16"
    assert "torch_dtype" not in content
    check_checkpoint(tmp_path / "out")


def test_an_old_configuration_with_generation_settings_can_be_written(tmp_path):
    model = pico("gpt2")
    model.config.do_sample = True
    model.config.temperature = 0.3
    check_checkpoint(write(tmp_path / "out", model))


def test_the_callers_configuration_is_not_changed(tmp_path):
    model = pico("llama")
    before = model.config.to_dict()
    write(tmp_path / "out", model, dtype=torch.float16)
    assert model.config.to_dict() == before


def test_no_path_of_this_machine_is_written(source, tmp_path):
    model = load_model(source)
    card = ModelCard.for_source(locate(str(source)), method="closed-form", target="gqa", kv_bytes=(8, 4))
    out = write(tmp_path / "out", model, source=source, card=card)
    for file in (out / "config.json", out / "README.md"):
        assert str(tmp_path) not in file.read_text()


def test_what_stands_beside_the_weights_comes_along(source, tmp_path):
    out = write(tmp_path / "out", pico("llama"), source=source)
    copied = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert copied == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "LICENSE",
    }
    assert load_tokenizer(out)("hello world").input_ids == [1, 2]


def test_copies_of_read_only_files_are_writable(source, tmp_path):
    (source / "LICENSE").chmod(0o444)
    out = write(tmp_path / "out", pico("llama"), source=source)
    assert (out / "LICENSE").stat().st_mode & 0o200


def test_a_model_with_decoupled_heads_is_written_and_read(tmp_path):
    model = pico("llama")
    adapter = adapter_for(model.config)
    maps = [((0, 0, 1, 2), (0, 1, 0, 1)), ((0, 0, 0, 0), (0, 1, 2, 3))]
    heads = [shared(layer, *both) for layer, both in zip(split_model(model, adapter), maps, strict=True)]
    config = decoupled_config(model.config, adapter, heads)
    out = tmp_path / "out"
    with writing(out) as folder:
        state = decoupled_model_state(model.state_dict(), adapter, heads)
        write_checkpoint(folder.root, state, config, source=tmp_path, dtype=torch.float32)
    check_weights(out)
    loaded = load_model(out)
    assert type(loaded).__name__ == "DhaLlamaForCausalLM"
    assert loaded.model.layers[1].self_attn.k_proj.out_features == 8


def test_a_disk_that_fills_up_while_weights_are_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("headfuse.checkpoints.write.save_torch_state_dict", full)
    model = pico("llama")
    with pytest.raises(ConfigError, match="disk is full"), writing(tmp_path / "out") as folder:
        write_checkpoint(folder.root, model.state_dict(), model.config, source=tmp_path, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_the_card_states_the_facts(source):
    card = ModelCard(
        base_model="org/model",
        on_hub=True,
        licence=base_licence(source),
        method="closed-form",
        target="dha",
        kv_bytes_before=4096,
        kv_bytes_after=1024,
        evaluation={"perplexity": 12.345678},
    )
    text = card.render()
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "org/model"
    assert head["license"] == "mit"
    assert head["library_name"] == "transformers"
    for fact in ("closed-form", "4,096 bytes", "1,024 bytes", "25.0%", "| perplexity | 12.35 |", "trust_remote_code"):
        assert fact in text


def test_the_card_of_a_local_model_claims_no_hub_id(source):
    text = ModelCard.for_source(Source("../x/source", source), method="m", target="gqa", kv_bytes=(2, 1)).render()
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "| base model | source |" in text
    assert "Evaluation" not in text


def test_the_licence_is_read_from_the_card_or_the_licence_file(source):
    assert base_licence(source) == "mit"
    (source / "README.md").write_text("---\nlicense: [a\n---\n")
    assert base_licence(source) == "apache-2.0"
    (source / "LICENSE").write_text("All rights reserved")
    assert base_licence(source) is None
    (source / "LICENSE").unlink()
    assert base_licence(source) is None
