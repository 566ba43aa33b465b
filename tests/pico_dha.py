"""Tiny models with decoupled heads, uneven on purpose."""

from transformers import PreTrainedModel

from headfuse.checkpoints.assembly import decoupled_config, decoupled_model_state, split_model
from headfuse.checkpoints.registry import ADAPTERS
from headfuse.models.dha import DHA_CLASSES
from pico import pico, shared

# (key map, value map) of each layer: 3 key and 2 value heads, then 2 and 3.
UNEVEN = [((0, 1, 2, 0), (1, 0, 0, 1)), ((1, 0, 1, 1), (2, 0, 1, 0))]


def pico_dha(family: str, **overrides) -> PreTrainedModel:
    """The pico model of a family with some of its heads shared, by other maps in each layer."""
    model, adapter = pico(family, **overrides), ADAPTERS[family]
    heads = [shared(layer, *maps) for layer, maps in zip(split_model(model, adapter), UNEVEN, strict=True)]
    converted = DHA_CLASSES[adapter.family].model(decoupled_config(model.config, adapter, heads)).eval()
    converted.load_state_dict(decoupled_model_state(model.state_dict(), adapter, heads))
    return converted
