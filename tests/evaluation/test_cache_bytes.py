"""Bytes of the real cache are those that the plan and the configuration promise."""

import pytest
import torch

from headfuse.evaluation.cache_bytes import cache_report, computed_cache_bytes, measured_cache_bytes
from headfuse.models.dha.llama import DhaLlamaConfig, DhaLlamaForCausalLM
from headfuse.planning.plan import HeadPlan, LayerPlan
from pico import GQA_FAMILIES, every_family, pico, pico_config

KEY_MAP = [[0, 0, 1, 2], [0, 0, 0, 0]]
VALUE_MAP = [[0, 1, 0, 1], [0, 1, 2, 3]]
NUM_HEADS = 3 + 2 + 1 + 4


@every_family
def test_stock_models_hold_what_their_configuration_says(family):
    overrides = {"num_key_value_heads": 2} if family in GQA_FAMILIES else {}
    model = pico(family, **overrides)
    assert measured_cache_bytes(model) == computed_cache_bytes(model.config, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unequal_maps_hold_what_the_plan_says(dtype):
    fields = pico_config("llama").to_dict() | {"key_map": KEY_MAP, "value_map": VALUE_MAP}
    fields.pop("model_type")
    model = DhaLlamaForCausalLM(DhaLlamaConfig(**fields)).to(dtype)
    layers = zip(KEY_MAP, VALUE_MAP, strict=True)
    plan = HeadPlan(
        target="dha",
        head_dim=8,
        layers=tuple(LayerPlan(key_map=tuple(keys), value_map=tuple(values)) for keys, values in layers),
    )
    expected = NUM_HEADS * 8 * dtype.itemsize
    assert computed_cache_bytes(plan, dtype) == expected
    assert cache_report(model) == {
        "measured_bytes_per_token": expected,
        "computed_bytes_per_token": expected,
        "dtype": str(dtype).removeprefix("torch."),
    }
