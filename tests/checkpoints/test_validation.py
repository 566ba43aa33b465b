"""Every way in which a checkpoint folder can be bad, and the one line that says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from headfuse.checkpoints.loading import load_config, load_model, load_tokenizer
from headfuse.checkpoints.source import locate
from headfuse.checkpoints.validation import check_checkpoint, check_weights
from headfuse.errors import CheckpointError, UnsupportedArchitectureError
from pico import every_family, logits_of, pico, tokens
from weight_folders import KEY, WEIGHTS, as_pickle, edit_config, edit_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A tiny sound checkpoint in one file."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    pico("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    """The same model in several files."""
    folder = tmp_path / "sharded"
    pico("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


def refusal(folder, kind=CheckpointError, **options):
    """The message of the refusal, which must be one line that names the folder."""
    with pytest.raises(kind) as caught:
        check_checkpoint(folder, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


@every_family
def test_a_sound_checkpoint_of_every_family_passes(family, tmp_path):
    pico(family).save_pretrained(tmp_path)
    check_checkpoint(tmp_path)


def test_shards_pass(sharded):
    check_checkpoint(sharded)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_weights_of_a_bare_backbone_pass(family, tmp_path):
    model = pico(family)
    model.save_pretrained(tmp_path)
    edit_weights(
        tmp_path,
        lambda tensors: [
            tensors.__setitem__(name.split(".", 1)[1], tensors.pop(name))
            for name in list(tensors)
            if name.startswith(model.base_model_prefix)
        ],
    )
    check_checkpoint(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path), tokens(1, 5)), logits_of(model, tokens(1, 5)))


def test_stored_buffers_with_infinity_pass(tmp_path):
    pico("gpt_neox").save_pretrained(tmp_path)
    name = "gpt_neox.layers.0.attention.masked_bias"
    edit_weights(tmp_path, lambda tensors: tensors.update({name: torch.tensor(-torch.inf)}))
    check_checkpoint(tmp_path)


def test_no_folder(tmp_path):
    assert "got nothing there" in refusal(tmp_path / "absent")


def test_a_file_instead_of_a_folder(folder):
    assert "got a file there" in refusal(folder / WEIGHTS)


def test_no_config(folder):
    (folder / "config.json").unlink()
    assert "wanted a model folder with config.json" in refusal(folder)


def test_an_adapter_of_peft(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "PEFT adapter: merge it" in refusal(folder)


@pytest.mark.parametrize("text", ["{not json", "[]", "\xff\xfe", ""])
def test_config_is_not_a_json_object(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin1"))
    assert "wanted" in refusal(folder)


def test_config_without_model_type(folder):
    (folder / "config.json").write_text("{}")
    assert "wanted a model_type, got none" in refusal(folder)


def test_config_with_a_value_of_the_wrong_type(folder):
    edit_config(folder, num_hidden_layers="two")
    assert "num_hidden_layers" in refusal(folder)


def test_an_unknown_model_type(folder):
    edit_config(folder, model_type="llama9")
    assert "'llama9'" in refusal(folder, UnsupportedArchitectureError)


def test_a_model_with_code_of_its_own(folder):
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    refusal(folder, UnsupportedArchitectureError)


def test_a_family_without_adapter(folder):
    edit_config(folder, model_type="mixtral")
    with pytest.raises(UnsupportedArchitectureError, match="mixture of experts"):
        check_checkpoint(folder)


def test_quantised_weights(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "gptq" in refusal(folder, UnsupportedArchitectureError)


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "got neither" in refusal(folder)


def test_a_missing_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(sharded)


def test_a_truncated_file(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    message = refusal(folder)
    assert "truncated" in message
    assert str(len(content)) in message


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"<html>404</html>" * 9, b"\x02" + bytes(7) + b"[]"])
def test_a_file_that_is_not_safetensors(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    assert "download it again" in refusal(folder)


def test_a_corrupt_header(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[20:40] = b"\x00" * 20
    (folder / WEIGHTS).write_bytes(content)
    assert "corrupt" in refusal(folder)


def test_a_header_that_lies_about_a_shape(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b'"shape":[32,32]', b'"shape":[32,31]', 1))
    assert "cannot be read as safetensors" in refusal(folder)


def test_a_git_lfs_pointer(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert "git lfs pull" in refusal(folder)


def test_an_index_that_names_another_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.extra"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX).write_text(json.dumps(index))
    assert "'model.extra'" in refusal(sharded)


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map(sharded, content):
    (sharded / INDEX).write_text(json.dumps(content))
    assert "weight_map" in refusal(sharded)


def test_an_index_that_leaves_its_folder(sharded):
    (sharded / INDEX).write_text(json.dumps({"weight_map": {KEY: "../model.safetensors"}}))
    assert "do not trust" in refusal(sharded)


@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinite"), (-torch.inf, "infinite")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(folder, value, word, dtype):
    def poison(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    edit_weights(folder, poison)
    message = refusal(folder)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert word in message


def test_config_with_fewer_key_value_heads_than_the_weights(folder):
    edit_config(folder, num_key_value_heads=2)
    message = refusal(folder)
    assert "k_proj.weight" in message
    assert "(16, None)" in message


def test_config_with_another_hidden_size(folder):
    edit_config(folder, hidden_size=64, head_dim=8)
    assert "self_attn" in refusal(folder)


def test_config_with_more_layers_than_the_weights(folder):
    edit_config(folder, num_hidden_layers=3)
    assert "layer 2 has no attention tensors" in refusal(folder)


def test_config_with_fewer_layers_than_the_weights(folder):
    edit_config(folder, num_hidden_layers=1)
    assert "the weights have more" in refusal(folder)


def test_config_with_another_mlp_width(folder):
    edit_config(folder, intermediate_size=40)
    assert "mlp" in refusal(folder)


@pytest.mark.parametrize("name", [KEY, "model.norm.weight"])
def test_a_missing_tensor(folder, name):
    edit_weights(folder, lambda tensors: tensors.pop(name))
    assert name.removeprefix("model.layers.1.self_attn.") in refusal(folder)


def test_a_pickle_is_refused(folder):
    as_pickle(folder)
    assert "--allow-pickle" in refusal(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_tensors_passes_when_allowed(folder, sound, zipped):
    tensors = load_file(sound / WEIGHTS)
    as_pickle(folder)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    check_checkpoint(folder, allow_pickle=True)
    model = load_model(locate(str(folder), allow_pickle=True))
    assert torch.equal(logits_of(model, tokens(1, 5)), logits_of(load_model(sound), tokens(1, 5)))


def test_a_sharded_pickle_passes_when_allowed(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check_checkpoint(folder, allow_pickle=True)


class Bomb:
    """Pickles as a call of a function."""

    def __reduce__(self):
        return print, ("this code must not run",)


@pytest.mark.parametrize("content", [{"weight": Bomb()}, [torch.zeros(2)], {"epoch": 3}])
def test_a_pickle_of_anything_else_is_refused_though_allowed(folder, content, capsys):
    as_pickle(folder, content)
    assert "safetensors" in refusal(folder, allow_pickle=True)
    assert capsys.readouterr().out == ""


def test_a_damaged_pickle_is_refused(folder):
    as_pickle(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "pytorch_model.bin" in refusal(folder, allow_pickle=True)


def test_weights_of_a_family_without_adapter_can_be_checked_alone(tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    check_weights(tmp_path)
    with pytest.raises(UnsupportedArchitectureError):
        check_checkpoint(tmp_path)


def test_loading_gives_a_frozen_quiet_model(folder, capfd):
    model = load_model(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_loading_never_invents_a_weight(folder):
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 tensors missing, the first is model\.norm\.weight"):
        load_model(folder)


def test_a_folder_without_tokenizer_has_none(folder):
    assert load_tokenizer(folder) is None


def test_a_broken_tokenizer_is_an_error(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(folder)


def test_the_config_loads(folder):
    assert load_config(folder).num_attention_heads == 4
