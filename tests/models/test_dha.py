"""Every decoupled class: the stock function, its own cache, generation, and loading without headfuse."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from headfuse.checkpoints.adapter import Adapter
from headfuse.checkpoints.assembly import (
    decoupled_config,
    decoupled_model_state,
    split_model,
    stock_config,
    stock_model_state,
)
from headfuse.checkpoints.heads import AttentionHeads
from headfuse.checkpoints.registry import ADAPTERS, adapter_for
from headfuse.errors import UnsupportedArchitectureError
from headfuse.models.dha import DHA_CLASSES
from headfuse.models.dha.export import export_code
from headfuse.planning.plan import HeadPlan, LayerPlan
from pico import FAMILIES, case_name, every_case, every_family, logits_of, pico, shared, tokens

# Unequal and uneven on purpose: (key map, value map) of each layer.
MAPS = [((0, 1, 0, 0), (2, 1, 0, 1)), ((2, 0, 1, 0), (0, 0, 0, 0))]
TIGHT = {"atol": 1e-4, "rtol": 0.0}


def decoupled(model: PreTrainedModel, heads: list[AttentionHeads]) -> PreTrainedModel:
    adapter = adapter_for(model.config)
    config = decoupled_config(model.config, adapter, heads)
    converted = DHA_CLASSES[adapter.family].model(config).eval()
    converted.load_state_dict(decoupled_model_state(model.state_dict(), adapter, heads))
    return converted


def uneven_heads(model: PreTrainedModel, adapter: Adapter) -> list[AttentionHeads]:
    return [shared(layer, *maps) for layer, maps in zip(split_model(model, adapter), MAPS, strict=True)]


def pico_dha(family: str, **overrides) -> PreTrainedModel:
    model = pico(family, **overrides)
    return decoupled(model, uneven_heads(model, ADAPTERS[family]))


@every_case
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_stock_model_s_own_heads_give_its_logits(family, overrides, implementation):
    model, ids = pico(family, **overrides), tokens(2, 11)
    converted = decoupled(model, split_model(model, adapter_for(model.config)))
    for each in (model, converted):
        each.set_attn_implementation(implementation)
    assert_close(logits_of(converted, ids), logits_of(model, ids), **TIGHT)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "olmo2"])  # whose norm would see the repeated heads
def test_shared_heads_equal_multi_head_attention_with_the_heads_repeated(family):
    model, ids = pico(family), tokens(2, 11)
    adapter = ADAPTERS[family]
    uneven = uneven_heads(model, adapter)
    repeated = [repeat(heads) for heads in uneven]
    reference = type(model)(stock_config(model.config, adapter, repeated)).eval()
    reference.load_state_dict(stock_model_state(model.state_dict(), adapter, repeated))
    assert_close(logits_of(decoupled(model, uneven), ids), logits_of(reference, ids), **TIGHT)


def repeat(heads: AttentionHeads) -> AttentionHeads:
    keys, values, own = list(heads.key_map), list(heads.value_map), tuple(range(heads.num_query_heads))
    return replace(
        heads,
        k=heads.k[keys],
        v=heads.v[values],
        k_bias=None if heads.k_bias is None else heads.k_bias[keys],
        v_bias=None if heads.v_bias is None else heads.v_bias[values],
        key_map=own,
        value_map=own,
    )


@every_family
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_cached_decoding_equals_a_full_prefill(family, static):
    model, ids = pico_dha(family), tokens(2, 12)
    full = logits_of(model, ids)
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    steps = [logits_of(model, ids[:, :5], past_key_values=cache)]
    steps += [logits_of(model, ids[:, t : t + 1], past_key_values=cache) for t in range(5, 12)]
    assert_close(torch.cat(steps, dim=1), full, **TIGHT)


@every_family
def test_the_cache_holds_the_bytes_that_the_plan_promises(family):
    model = pico_dha(family)
    layers = tuple(LayerPlan(key_map=keys, value_map=values) for keys, values in MAPS)
    plan = HeadPlan(target="dha", head_dim=ADAPTERS[family].shape(model.config).head_dim, layers=layers)
    cache = DynamicCache(config=model.config)
    logits_of(model, tokens(3, 7), past_key_values=cache)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert held == 3 * 7 * plan.kv_bytes_per_token(4)


def generated(model: PreTrainedModel, ids: torch.Tensor, **options) -> torch.Tensor:
    mask = options.pop("attention_mask", torch.ones_like(ids))
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, **options)
    return out[:, ids.shape[1] :]


@every_family
def test_generation_agrees_across_caches_padding_and_no_cache(family):
    model, ids = pico_dha(family), tokens(2, 6)
    dynamic = generated(model, ids)
    assert torch.equal(generated(model, ids, cache_implementation="static"), dynamic)
    assert torch.equal(generated(model, ids, use_cache=False), dynamic)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    assert torch.equal(generated(model, padded, attention_mask=(padded != 0).long()), dynamic)


@every_family
def test_beams_and_chunked_prefill_work(family):
    model, ids = pico_dha(family), tokens(2, 6)
    assert generated(model, ids, num_beams=3).shape == (2, 8)
    assert torch.equal(generated(model, ids, prefill_chunk_size=4), generated(model, ids))


@every_family
def test_gradients_reach_every_attention_parameter(family):
    model, ids = pico_dha(family), tokens(2, 6)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "proj" in name)


@every_family
def test_saving_and_loading_keeps_the_logits(family, tmp_path):
    model, ids = pico_dha(family), tokens(2, 6)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(again) is type(model)
    assert again.config.key_map == [list(keys) for keys, _ in MAPS]
    assert torch.equal(logits_of(again, ids), logits_of(model, ids))


@every_family
def test_an_empty_model_loads_a_state_without_a_folder(family):
    model, ids = pico(family), tokens(2, 6)
    heads = uneven_heads(model, ADAPTERS[family])
    config = decoupled_config(model.config, ADAPTERS[family], heads)
    state = decoupled_model_state(model.state_dict(), ADAPTERS[family], heads)
    loaded = DHA_CLASSES[family].model.from_pretrained(None, config=config, state_dict=state)
    assert_close(logits_of(loaded, ids), logits_of(pico_dha(family), ids), **TIGHT)


@every_family
def test_a_decoupled_model_refuses_tensor_parallelism(family):
    model = pico_dha(family)
    assert not model.supports_tp_plan
    assert model.tp_plan == {}


@every_family
def test_maps_default_to_the_family_s_own_sharing(family):
    config = DHA_CLASSES[family].config(num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=2)
    assert config.key_map == config.value_map == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"key_map": [[0, 1, 2, 3]]}, "one entry for each of 2 layers, got 1"),
        ({"value_map": [[0, 1, 2, 3], [0, 2, 2, 0]]}, r"value_map\[1\] must name one of the heads"),
        ({"key_map": [[0, 1], [0, 1]]}, r"key_map\[0\] must name .* for each of 4 query heads"),
    ],
    ids=case_name,
)
def test_maps_that_do_not_fit_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        DHA_CLASSES["llama"].config(num_attention_heads=4, num_hidden_layers=2, hidden_size=32, **maps)


def test_a_paged_cache_is_refused():
    model = pico_dha("llama")
    model.config._attn_implementation_internal = "paged|sdpa"
    with pytest.raises(ValueError, match=r"one head count for keys and values; .* or `headfuse generate`"):
        model.model.layers[0].self_attn(torch.zeros(1, 2, 32), (torch.ones(1, 2, 8), torch.zeros(1, 2, 8)))


def test_attention_weights_are_refused_rather_than_left_out():
    with pytest.raises(ValueError, match="forward hooks on the attention modules"):
        logits_of(pico_dha("llama"), tokens(1, 4), output_attentions=True)


def test_every_family_has_registered_classes():
    assert DHA_CLASSES.keys() == FAMILIES.keys()
    for family, classes in DHA_CLASSES.items():
        assert classes.config.model_type == f"dha_{family}"
        assert isinstance(AutoConfig.for_model(f"dha_{family}"), classes.config)
        assert AutoModelForCausalLM._model_mapping[classes.config] is classes.model


def test_code_for_an_unknown_family_is_refused(tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=r"mamba: wanted .* use one of gpt2, "):
        export_code("mamba", tmp_path)


FRESH_PROCESS = """
import sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "headfuse":
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM

for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        assert torch.equal(model(expected["ids"]).logits, expected["logits"]), folder.name
        model.generate(expected["ids"], attention_mask=torch.ones_like(expected["ids"]), max_new_tokens=2)
    assert not any(name.startswith("headfuse") for name in sys.modules)
    print(folder.name, type(model).__name__)
"""


def test_exported_folders_load_in_a_process_without_headfuse(tmp_path):
    for family in FAMILIES:
        folder = tmp_path / "models" / family
        model, ids = pico_dha(family), tokens(2, 6)
        model.save_pretrained(folder)
        entries = export_code(family, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))
        torch.save({"ids": ids, "logits": logits_of(model, ids)}, folder / "expected.pt")
    threads = str(torch.get_num_threads())  # the same order of summation
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": threads}
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(tmp_path / "models")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    names = [classes.model.__name__ for _, classes in sorted(DHA_CLASSES.items())]
    assert [line.split()[1] for line in run.stdout.splitlines()] == names


def test_exported_files_import_nothing_but_torch_transformers_and_each_other(tmp_path):
    for family in FAMILIES:
        export_code(family, tmp_path)
    allowed = {"", "collections", "dataclasses", "torch", "transformers", "typing"}  # "": a relative import
    for file in tmp_path.glob("*.py"):
        lines = file.read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.lstrip().startswith(("import ", "from "))]
        assert {name.partition(".")[0] for name in imports} <= allowed
