"""What runs a model to measure it: logits in some positions are those of all positions there, in every family."""

import pytest
import torch

from headfuse.evaluation.inference import forward_logits, measuring
from pico import FAMILIES, pico, tokens
from pico_dha import pico_dha


@pytest.mark.parametrize("build", [pico, pico_dha])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_some_positions_are_those_of_all_there(family, build):
    model, text = build(family), tokens(3, 20)
    kept = torch.tensor([0, 7, 18])
    with measuring(model):
        everywhere, there = forward_logits(model, text), forward_logits(model, text, kept)
    assert there.shape == (3, 3, everywhere.shape[-1])
    torch.testing.assert_close(there, everywhere[:, kept], atol=1e-5, rtol=1e-5)
