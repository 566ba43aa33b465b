"""The methods by name: what each groups on, and that nothing happens where nothing is shared."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from headfuse.checkpoints.describe import SharingName
from headfuse.errors import ConfigError, PlanError
from headfuse.planning.grouping import HeadGroups, contiguous_groups
from headfuse.sharing.methods import METHODS, SharingOptions, SourceLayer, group_layer, method_named
from strategies import random_heads, random_input, seeded, statistics_of, with_copies

every_method = pytest.mark.parametrize("name", METHODS)
OPTIONS = [
    SharingOptions(),
    SharingOptions(restore_norm=True),
    SharingOptions(criterion="cos"),
    SharingOptions(group_on="key"),
    SharingOptions(group_on="none"),
]


def layer_of(**options) -> SourceLayer:
    heads = random_heads(seeded(3), num_query_heads=6, **options)
    return SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))


def grouped(layer, counts, name, options=None, target="dha", seed=0):
    return group_layer(layer, counts, METHODS[name], options or SharingOptions(), target=target, generator=seeded(seed))


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"'svd'.*closed-form"):
        method_named("svd")


def test_every_method_that_models_are_described_for_is_there():
    assert tuple(METHODS) == get_args(SharingName)


@every_method
def test_a_known_method_is_found(name):
    assert method_named(name) is METHODS[name]


@every_method
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_gqa_groups_keys_and_values_alike_in_equal_sizes(name, options, count):
    groups = grouped(layer_of(), (count, count), name, options, "gqa")
    assert groups.keys == groups.values
    assert {len(group) for group in groups.keys} == {6 // count}


@every_method
def test_gqa_refuses_groups_that_cannot_be_equal(name):
    if name != "mean-pool":
        with pytest.raises(PlanError, match="equal groups"):
            grouped(layer_of(), (4, 4), name, target="gqa")


@every_method
@pytest.mark.parametrize("options", OPTIONS)
def test_dha_leaves_the_counts_that_were_asked_for(name, options):
    groups = grouped(layer_of(), (2, 5), name, options)
    assert (len(groups.keys), len(groups.values)) == (2, 5)
    for kind in (groups.keys, groups.values):
        assert sorted(head for group in kind for head in group) == list(range(6))


@every_method
@pytest.mark.parametrize("target", ["gqa", "dha"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("qk_norm", ["none", "head", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_every_head_keeps_every_bit(name, target, options, qk_norm, dtype):
    layer = layer_of(bias=True, qk_norm=qk_norm, rotary_dim=4, dtype=dtype)
    groups = grouped(layer, layer.counts, name, options, target)
    assert groups == HeadGroups(*(contiguous_groups(6, 6),) * 2)
    shared = METHODS[name].share(layer, groups, options)
    for field, tensor in vars(layer.heads).items():
        found = getattr(shared, field)
        assert torch.equal(found, tensor) if isinstance(tensor, torch.Tensor) else found == tensor, field


@pytest.mark.parametrize("name", ["procrustes", "closed-form"])
@pytest.mark.parametrize("target", ["gqa", "dha"])
def test_copies_are_found_and_grouped(name, target):
    wanted = ((0, 4), (1, 3), (2, 5))
    heads = with_copies(layer_of().heads, HeadGroups(wanted, wanted))
    layer = SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))
    assert grouped(layer, (3, 3), name, target=target) == HeadGroups(wanted, wanted)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_one_grouping_for_both_looks_at_keys_and_at_values(kind):
    wanted, alone = ((0, 4), (1, 3), (2, 5)), contiguous_groups(6, 6)
    copies = HeadGroups(wanted, alone) if kind == "keys" else HeadGroups(alone, wanted)
    heads = with_copies(layer_of().heads, copies)
    layer = SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))
    other = grouped(layer, (3, 3), "closed-form")
    assert (other.values if kind == "keys" else other.keys) != wanted
    assert grouped(layer, (3, 3), "closed-form", target="gqa") == HeadGroups(wanted, wanted)


@pytest.mark.parametrize("name", ["procrustes", "closed-form"])
def test_keys_that_differ_in_size_alone_are_no_copies_behind_a_norm_over_all_heads(name):
    heads = random_heads(seeded(3), qk_norm="all")
    key = heads.k.clone()
    key[1] = 0.1 * key[0]
    key[3] = key[2] + 0.05 * torch.randn(key[2].shape, generator=seeded(5), dtype=key.dtype)
    heads = replace(heads, k=key, k_norm=torch.ones_like(key[..., 0]))
    layer = SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))
    assert grouped(layer, (3, 4), name).keys == ((0,), (1,), (2, 3))


@pytest.mark.parametrize("qk_norm", ["head", "all"])
@pytest.mark.parametrize("criterion", ["dist", "cos"])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_keys_that_no_rotation_reaches_are_grouped_as_they_are(qk_norm, criterion, rotary_dim):
    heads = random_heads(seeded(3), qk_norm=qk_norm, rotary_dim=rotary_dim)
    # Half a turn takes head 0 to head 2 and head 1 to head 3; as they are, 0 is near 1 and 2 near 3.
    near = heads.k[0] + 0.05 * heads.k[1]
    heads = replace(heads, k=torch.stack([heads.k[0], near, -heads.k[0], -near]), k_norm=torch.ones_like(heads.k_norm))
    layer = SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))
    options = SharingOptions(criterion=criterion, group_on="key")
    assert grouped(layer, (2, 4), "procrustes", options).keys == ((0, 1), (2, 3))
    assert grouped(layer, (2, 2), "procrustes", options, "gqa").keys == ((0, 1), (2, 3))


def test_mean_pool_groups_neighbours():
    assert grouped(layer_of(), (2, 3), "mean-pool") == HeadGroups(contiguous_groups(6, 2), contiguous_groups(6, 3))


@pytest.mark.parametrize(("target", "values"), [("gqa", 8), ("dha", 32)])
def test_groups_follow_the_seed(target, values):
    heads = random_heads(seeded(3), num_query_heads=32, head_dim=4)  # too many partitions to try them all
    layer = SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))
    first, *others, again = (grouped(layer, (8, values), "procrustes", None, target, seed) for seed in (0, 1, 2, 3, 0))
    assert again == first
    assert any(groups != first for groups in others)


@pytest.mark.parametrize("name", ["procrustes", "closed-form"])
def test_found_groups_cost_no_more_than_neighbours(name):
    layer = layer_of()
    prices = METHODS[name].prices(layer, SharingOptions())
    assert prices is not None
    groups = grouped(layer, (2, 3), name)
    for price, found, count in zip(prices, (groups.keys, groups.values), (2, 3), strict=True):
        neighbours = sum(price(group) for group in contiguous_groups(6, count) if len(group) > 1)
        assert sum(price(group) for group in found if len(group) > 1) <= neighbours + 1e-9


@pytest.mark.parametrize("criterion", ["dist", "cos"])
def test_alignment_prices_are_distances_that_groups_of_unequal_sizes_can_compare(criterion):
    pairs = ((0, 3), (1, 4), (2, 5))
    heads = with_copies(layer_of().heads, HeadGroups(pairs, pairs))
    layer = SourceLayer.of(heads, statistics_of(heads, random_input(seeded(4), heads.hidden_size)))
    options = SharingOptions(criterion=criterion)
    for price in METHODS["procrustes"].prices(layer, options) or ():
        assert price((2,)) == 0
        assert price((0, 3)) == pytest.approx(0, abs=1e-9)
        assert all(price(group) > 0 for group in ((0, 1), (0, 1, 2), (0, 1, 3), (0, 1, 2, 3, 4, 5)))
    assert grouped(layer, (3, 3), "procrustes", options) == HeadGroups(pairs, pairs)
