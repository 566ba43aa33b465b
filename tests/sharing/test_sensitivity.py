"""Unit costs: prices give the shape, one measurement the scale, and nothing that is shared looks free."""

import pytest
import torch

from headfuse.errors import ConfigError
from headfuse.planning.budget import knapsack
from headfuse.planning.grouping import HeadGroups
from headfuse.sharing.methods import METHODS, SharingOptions, SourceLayer
from headfuse.sharing.sensitivity import unit_costs
from strategies import attention_output, random_heads, random_input, seeded, statistics_of, with_copies

X = random_input(seeded(7), 20)


def layer_of(heads) -> SourceLayer:
    return SourceLayer.of(heads, statistics_of(heads, X))


@pytest.fixture(scope="module")
def layers():
    return [layer_of(random_heads(seeded(seed), num_query_heads=6, num_key_heads=k)) for seed, k in ((0, 6), (1, 3))]


def divergence_of(layers, calls=None):
    """Squared error of the layer's output: something that sharing makes worse."""

    def divergence(index, heads):
        value = (attention_output(heads, X) - attention_output(layers[index].heads, X)).pow(2).mean().item()
        if calls is not None:
            calls.append((index, heads.num_key_heads, heads.num_value_heads, value))
        return value

    return divergence


def costs_of(layers, share, name="closed-form", options=None, calls=None):
    return unit_costs(
        layers, METHODS[name], options or SharingOptions(), share_left=share, divergence=divergence_of(layers, calls)
    )


@pytest.mark.parametrize("name", ["closed-form", "procrustes"])
def test_every_count_of_every_unit_has_a_cost_that_falls_to_zero(layers, name):
    costs = costs_of(layers, 0.5, name)
    assert [sorted(unit) for unit in costs] == [list(range(1, n + 1)) for n in (6, 6, 3, 3)]
    for unit in costs:
        assert unit[max(unit)] == 0
        assert all(unit[count] >= unit[count + 1] for count in range(1, max(unit)))
        assert unit[1] > 0


def test_the_cost_of_the_probed_count_is_what_was_measured(layers):
    calls = []
    costs = costs_of(layers, 1 / 3, calls=calls)
    assert [call[:3] for call in calls] == [(0, 2, 6), (0, 6, 2), (1, 1, 3), (1, 3, 1)]
    for unit, (_, *_, measured), probed in zip(costs, calls, (2, 2, 1, 1), strict=True):
        assert unit[probed] == pytest.approx(measured)


@pytest.mark.parametrize("share", [0.9, 1.0])
def test_a_large_budget_still_measures_and_keeps_heads(layers, share):
    calls = []
    costs = costs_of(layers, share, calls=calls)
    assert all(unit[1] > unit[max(unit)] for unit in costs)
    assert knapsack(costs, 18) == [6, 6, 3, 3]
    assert sum(knapsack(costs, 17)) == 17


def test_units_that_share_for_nothing_give_their_heads_away():
    groups = ((0, 1, 2), (3, 4, 5))
    copies = with_copies(random_heads(seeded(2), num_query_heads=6), HeadGroups(groups, groups))
    layers = [layer_of(copies), layer_of(random_heads(seeded(3), num_query_heads=6))]
    costs = costs_of(layers, 0.5)  # 3 of 6: below the price of rounding, so fewer are probed
    for unit in costs[:2]:
        assert unit[2] < 1e-6 * unit[1]
    assert knapsack(costs, 16)[:2] == [2, 2]


def test_a_measurement_of_zero_does_not_make_heads_free(layers):
    costs = unit_costs(layers, METHODS["closed-form"], SharingOptions(), share_left=0.5, divergence=lambda *_: -1e-12)
    assert knapsack(costs, 18) == [6, 6, 3, 3]


@pytest.mark.parametrize(
    ("name", "options"), [("mean-pool", SharingOptions()), ("procrustes", SharingOptions(group_on="none"))]
)
def test_methods_without_prices_are_refused(layers, name, options):
    with pytest.raises(ConfigError, match="uniform"):
        costs_of(layers, 0.5, name, options)


def test_units_of_one_head_cost_nothing():
    layers = [layer_of(random_heads(seeded(0), num_key_heads=1, dtype=torch.float64))]
    assert costs_of(layers, 0.25) == [{1: 0.0}, {1: 0.0}]
