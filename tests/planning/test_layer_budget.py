"""The paper's budget by layer: divisors of the heads, spent to the last one, more where the loss is larger."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import PlanError
from headfuse.planning.annealing import within_distance
from headfuse.planning.grouping import contiguous_groups
from headfuse.planning.layer_budget import (
    allowed_counts,
    divisor_costs,
    divisor_groups,
    greedy_counts,
    knapsack_counts,
)
from strategies import seeded


def random_distances(num_heads: int, seed: int) -> torch.Tensor:
    matrix = torch.rand(num_heads, num_heads, generator=seeded(seed))
    return (matrix + matrix.mT).fill_diagonal_(0.0) / 2


@pytest.mark.parametrize(
    ("num_heads", "counts"),
    [(32, [4, 8, 16, 32]), (20, [2, 4, 5, 10, 20]), (16, [2, 4, 8, 16]), (8, [1, 2, 4, 8]), (3, [1, 3]), (1, [1])],
)
def test_units_keep_divisors_of_their_heads(num_heads, counts):
    assert allowed_counts(num_heads) == counts


def test_half_the_heads_go_to_the_highest_losses_and_the_rest_by_loss_per_head():
    # Minima 4 x 4 = 16. One unit in four may be raised: the second, to 16. What is left is spent where the score per
    # head is highest: 60 / 4, then 40 / 4 against 60 / 8.
    scores = [60.0, 100.0, 40.0, 10.0]
    assert greedy_counts(scores, [32] * 4, 16) == [4, 4, 4, 4]
    assert greedy_counts(scores, [32] * 4, 28) == [4, 16, 4, 4]
    assert greedy_counts(scores, [32] * 4, 32) == [8, 16, 4, 4]
    assert greedy_counts(scores, [32] * 4, 36) == [8, 16, 8, 4]
    assert greedy_counts(scores, [32] * 4, 128) == [32] * 4


def test_limit_bounds_the_units_that_are_raised_at_once():
    scores = [4.0, 3.0, 2.0, 1.0]
    assert greedy_counts(scores, [32] * 4, 40, limit=0.5) == [16, 16, 4, 4]
    assert greedy_counts(scores, [32] * 4, 40, limit=0.0) == [16, 8, 8, 8]


@pytest.mark.parametrize("seed", range(3))
def test_a_quarter_of_a_7b_model_is_spent_exactly_and_in_the_order_of_the_losses(seed):
    scores = torch.rand(64, generator=seeded(seed)).tolist()
    counts = greedy_counts(scores, [32] * 64, 512)
    assert sum(counts) == 512
    order = sorted(range(64), key=lambda unit: -scores[unit])
    assert [counts[unit] for unit in order] == sorted(counts, reverse=True)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    heads = draw(st.lists(st.sampled_from([1, 3, 4, 6, 8, 12, 20]), min_size=1, max_size=6))
    scores = draw(st.lists(st.floats(0, 10), min_size=len(heads), max_size=len(heads)))
    return scores, heads, draw(st.integers(0, sum(heads)))


@given(budgets(), st.sampled_from([0.0, 0.25, 1.0]))
def test_the_budget_is_spent_exactly_or_refused_because_no_divisors_meet_it(case, limit):
    scores, heads, total = case
    sums = {sum(counts) for counts in itertools.product(*map(allowed_counts, heads))}
    if total not in sums:
        with pytest.raises(PlanError, match="choose one of these"):
            greedy_counts(scores, heads, total, limit=limit)
        return
    counts = greedy_counts(scores, heads, total, limit=limit)
    assert sum(counts) == total
    assert all(count in allowed_counts(num_heads) for count, num_heads in zip(counts, heads, strict=True))


def test_a_budget_between_two_sums_of_divisors_names_both():
    with pytest.raises(PlanError, match=r"wanted 5 cached heads, .* reach 4 or 6 \(from 2 to 6\)") as caught:
        greedy_counts([1.0, 1.0], [3, 3], 5)
    assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match=r"reach 8 \(from 8 to 64\)"):
        greedy_counts([1.0, 1.0], [32, 32], 7)
    with pytest.raises(PlanError, match=r"reach 64 \(from 8 to 64\)"):
        greedy_counts([1.0, 1.0], [32, 32], 65)


def test_costs_are_the_members_scatter_about_their_mean():
    operators = torch.randn(8, 8, 3, generator=seeded(0), dtype=torch.float64)
    distances = (operators[:, None] - operators[None]).pow(2).mean((-1, -2))
    groupings = {count: contiguous_groups(8, count) for count in (1, 2, 4, 8)}
    scatter = {
        count: sum((operators[list(g)] - operators[list(g)].mean(0)).pow(2).mean(-1).sum().item() for g in groups)
        for count, groups in groupings.items()
    }
    assert divisor_costs(distances, groupings) == pytest.approx(scatter)
    assert divisor_costs(distances, groupings)[8] == 0.0


def test_groups_at_every_count_beat_neighbours():
    distances = random_distances(8, 0)
    groupings = divisor_groups(distances, generator=seeded(0))
    assert list(groupings) == [1, 2, 4, 8]
    for count, groups in groupings.items():
        assert within_distance(distances, groups) <= within_distance(distances, contiguous_groups(8, count)) + 1e-6


@pytest.mark.parametrize("total", [3, 6, 9, 12, 24])
def test_knapsack_equals_the_best_of_all_choices(total):
    distances = [scale * random_distances(8, seed) for seed, scale in enumerate((1.0, 3.0, 0.3))]
    costs = [divisor_costs(each, divisor_groups(each, generator=seeded(0))) for each in distances]
    choices = [counts for counts in itertools.product(*costs) if sum(counts) <= total]
    best = min(sum(unit[n] for unit, n in zip(costs, counts, strict=True)) for counts in choices)
    counts, groups = knapsack_counts(distances, total, generator=seeded(0))
    assert sum(counts) <= total
    assert sum(unit[n] for unit, n in zip(costs, counts, strict=True)) == pytest.approx(best)
    assert [len(each) for each in groups] == counts


def test_knapsack_leaves_heads_where_the_loss_is():
    alike, unlike = torch.zeros(8, 8), random_distances(8, 0)
    assert knapsack_counts([alike, unlike], 9, generator=seeded(0))[0] == [1, 8]
    with pytest.raises(PlanError, match="raise the budget"):
        knapsack_counts([alike, unlike], 1, generator=seeded(0))
