"""Exactness checks: they pass what is right and refuse what is not, before anything is written."""

from dataclasses import replace

import pytest
import torch

from headfuse.checkpoints.opened import LoadedModel
from headfuse.checkpoints.parity import split_parity, written_parity
from headfuse.checkpoints.registry import adapter_for
from headfuse.errors import CheckpointError
from pico import every_case, pico, tokens

ROWS = tokens(2, 12)


def opened(model) -> LoadedModel:
    return LoadedModel.of(model, adapter_for(model.config))


def misread(loaded: LoadedModel) -> LoadedModel:
    """As an adapter would give it that confuses two query heads."""
    first, *others = loaded.heads
    swapped = replace(first, q=first.q[[1, 0, *range(2, len(first.q))]])
    return replace(loaded, heads=[swapped, *others])


@every_case
def test_a_model_is_what_its_heads_compute(family, overrides):
    assert split_parity(opened(pico(family, **overrides)), ROWS) <= 1e-5


def test_a_misread_checkpoint_is_refused_in_one_line():
    with pytest.raises(CheckpointError, match="the checkpoint's heads: wanted the same logits") as caught:
        split_parity(misread(opened(pico("llama"))), ROWS)
    assert "\n" not in str(caught.value)


def test_a_folder_is_compared_as_it_is_stored(tmp_path):
    pico("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = opened(pico("llama"))
    assert written_parity(tmp_path, loaded, loaded.heads, ROWS, dtype=torch.bfloat16) <= 1e-5


def test_a_folder_with_other_heads_than_were_converted_is_refused(tmp_path):
    pico("llama").save_pretrained(tmp_path)
    loaded = opened(pico("llama"))
    with pytest.raises(CheckpointError, match="the written folder: wanted the same logits"):
        written_parity(tmp_path, loaded, misread(loaded).heads, ROWS, dtype=torch.float32)
