"""Parameter groups cover a model once, and every optimizer moves its own as it was told."""

import pytest
import torch
from torch import nn

from headfuse.checkpoints.assembly import decoder_layers
from headfuse.checkpoints.registry import adapter_for
from headfuse.training.optimizers import ParameterGroup, build_optimizers, model_groups, set_rates
from headfuse.training.options import TrainingOptions
from pico import FAMILIES, pico

FAMILY_AND_UPDATE = [(family, update) for family in FAMILIES for update in ("adamw", "muon")]


def groups_of(model, *, update="adamw", without=(), **changed):
    blocks = decoder_layers(model, adapter_for(model.config))
    return model_groups(model, blocks, TrainingOptions(update=update, **changed), without=without)


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


@pytest.mark.parametrize(("family", "update"), FAMILY_AND_UPDATE)
def test_groups_hold_every_parameter_once(family, update):
    model = pico(family)
    ids = [id(p) for group in groups_of(model, update=update) for p in group.parameters]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("update", ["adamw", "muon"])
def test_tied_embeddings_are_one_parameter_and_what_is_left_out_stays_out(update):
    model = pico("llama", tie_word_embeddings=True)
    key = model.model.layers[0].self_attn.k_proj.weight
    ids = [id(p) for group in groups_of(model, update=update, without=[key]) for p in group.parameters]
    assert len(ids) == len(set(ids)) == len(list(model.parameters())) - 1
    assert id(key) not in ids
    assert id(model.lm_head.weight) in ids


def test_muon_moves_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = pico("gpt2")
    matrices, rest = groups_of(model, update="muon")
    names = {id(p): name for name, p in model.named_parameters()}
    assert (matrices.update, rest.update) == ("muon", "adamw")
    assert {names[id(p)].split(".", 3)[-1] for p in matrices.parameters} == {
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }
    assert {"transformer.wte.weight", "transformer.wpe.weight"} < {names[id(p)] for p in rest.parameters}
    built = build_optimizers([matrices, rest], TrainingOptions(update="muon"))
    assert [type(one) for one in built] == [torch.optim.AdamW, torch.optim.Muon]


def test_a_group_without_parameters_has_no_optimizer():
    built = build_optimizers(
        [ParameterGroup("none", [], 1.0, "muon"), ParameterGroup("one", [parameter(1)], 1.0)], TrainingOptions()
    )
    assert [type(one) for one in built] == [torch.optim.AdamW]
    assert len(built[0].param_groups) == 1


def test_ascent_climbs_and_descent_descends():
    up, down = parameter(1), parameter(1)
    groups = [ParameterGroup("up", [up], 0.1, ascent=True), ParameterGroup("down", [down], 0.1)]
    (optimizer,) = build_optimizers(groups, TrainingOptions())
    (up + down).sum().backward()
    optimizer.step()
    assert up.item() == pytest.approx(1.1)
    assert down.item() == pytest.approx(0.9)


@pytest.mark.parametrize("update", ["adamw", "muon"])
def test_weight_decay_spares_what_is_not_decayed(update):
    decayed, spared = parameter(2, 2), parameter(2, 2)
    groups = [ParameterGroup("a", [decayed], 0.1, update), ParameterGroup("b", [spared], 0.1, update, decayed=False)]
    (optimizer,) = build_optimizers(groups, TrainingOptions(weight_decay=0.5))
    for each in (decayed, spared):
        each.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(spared.detach(), torch.ones(2, 2))


def test_muon_without_decay_has_none():
    one = parameter(2, 2)
    (optimizer,) = build_optimizers([ParameterGroup("a", [one], 0.1, "muon")], TrainingOptions())
    one.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(one.detach(), torch.ones(2, 2))


def test_muon_steps_are_of_the_size_of_adamw_s():
    torch.manual_seed(0)
    sizes = {}
    for update in ("adamw", "muon"):
        one = parameter(48, 32)
        (optimizer,) = build_optimizers([ParameterGroup("a", [one], 0.1, update)], TrainingOptions())
        one.grad = torch.randn(48, 32)
        optimizer.step()
        sizes[update] = (one.detach() - 1).pow(2).mean().sqrt().item()
    assert 0.1 < sizes["muon"] / sizes["adamw"] < 1.0  # AdamW's first step is 1 a weight, later ones about 0.2


def test_rates_are_shares_of_each_group_s_peak():
    groups = [ParameterGroup("a", [parameter(1)], 0.1), ParameterGroup("b", [parameter(1)], 0.4)]
    built = build_optimizers(groups, TrainingOptions())
    for factor in (0.5, 1.0, 0.25):
        set_rates(built, factor)
        assert [group["lr"] for group in built[0].param_groups] == pytest.approx([0.1 * factor, 0.4 * factor])
