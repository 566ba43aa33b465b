"""The search for groups: valid, exact where it can be, never worse than neighbouring heads, frugal with prices."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import PlanError
from headfuse.planning.grouping import Group, compose, contiguous_groups, group_heads, ladder, memoised
from strategies import group_tuples, seeded

SEEDS = st.integers(0, 2**16)


class Counted:
    """The scatter of random points in a group: a price like the real ones, super-additive and counting its calls."""

    def __init__(self, num_heads: int, seed: int, dim: int = 3) -> None:
        self.points = torch.randn(num_heads, dim, generator=seeded(seed), dtype=torch.float64)
        self.calls = 0

    def __call__(self, group: Group) -> float:
        self.calls += 1
        chosen = self.points[list(group)]
        return (chosen - chosen.mean(0)).pow(2).sum().item()

    def total(self, groups: tuple[Group, ...]) -> float:
        return sum(self(group) for group in groups)


def equal_cases() -> st.SearchStrategy[tuple[int, int]]:
    return st.sampled_from([(1, 1), (4, 2), (6, 2), (6, 3), (6, 6), (8, 1), (9, 3), (12, 4), (12, 6), (16, 4)])


@st.composite
def any_cases(draw: st.DrawFn) -> tuple[int, int]:
    num_heads = draw(st.integers(1, 14))
    return num_heads, draw(st.integers(1, num_heads))


def brute_force(num_heads: int, count: int, price: Counted, *, equal_sizes: bool) -> float:
    """Least total over all labelings: independent of the generator of partitions under test."""
    best = float("inf")
    for labels in itertools.product(range(count), repeat=num_heads):
        sizes = [labels.count(label) for label in range(count)]
        if min(sizes) == 0 or (equal_sizes and max(sizes) != min(sizes)):
            continue
        groups = tuple(tuple(h for h in range(num_heads) if labels[h] == label) for label in range(count))
        best = min(best, price.total(groups))
    return best


def assert_partition(groups: tuple[Group, ...], num_heads: int, count: int) -> None:
    assert len(groups) == count
    assert sorted(head for group in groups for head in group) == list(range(num_heads))
    assert all(list(group) == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)


@given(any_cases(), SEEDS)
def test_groups_are_a_sorted_partition_no_worse_than_contiguous(case, seed):
    num_heads, count = case
    price = Counted(num_heads, seed)
    groups = group_heads(num_heads, count, price, equal_sizes=False, generator=seeded(seed))
    assert_partition(groups, num_heads, count)
    assert price.total(groups) <= price.total(contiguous_groups(num_heads, count)) + 1e-9


@given(equal_cases(), SEEDS)
def test_equal_groups_are_equal_and_no_worse_than_contiguous(case, seed):
    num_heads, count = case
    price = Counted(num_heads, seed)
    groups = group_heads(num_heads, count, price, equal_sizes=True, generator=seeded(seed))
    assert_partition(groups, num_heads, count)
    assert {len(group) for group in groups} == {num_heads // count}
    assert price.total(groups) <= price.total(contiguous_groups(num_heads, count)) + 1e-9


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize(("num_heads", "count"), [(4, 2), (6, 2), (6, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_few_heads_are_grouped_optimally(num_heads, count, seed, equal_sizes):
    price = Counted(num_heads, seed)
    groups = group_heads(num_heads, count, price, equal_sizes=equal_sizes, generator=seeded(seed))
    assert price.total(groups) == pytest.approx(brute_force(num_heads, count, price, equal_sizes=equal_sizes))


@pytest.mark.parametrize("equal_sizes", [True, False])
@pytest.mark.parametrize(("num_heads", "count"), [(6, 3), (6, 2), (8, 2), (8, 4)])
def test_search_finds_the_optimum_that_enumeration_finds(num_heads, count, equal_sizes, monkeypatch):
    def found(seed: int) -> float:
        price = Counted(num_heads, seed)
        groups = group_heads(num_heads, count, price, equal_sizes=equal_sizes, generator=seeded(seed), restarts=6)
        return price.total(groups)

    exact = [found(seed) for seed in range(8)]
    monkeypatch.setattr("headfuse.planning.grouping.MAX_ENUMERATED", 0)
    assert [found(seed) for seed in range(8)] == pytest.approx(exact)


@pytest.mark.parametrize("equal_sizes", [True, False])
def test_search_recovers_planted_groups(equal_sizes):
    price = Counted(16, 3, dim=4)
    labels = torch.randperm(16, generator=seeded(5)) % 4
    price.points = 10 * torch.eye(4, dtype=torch.float64)[labels] + 0.1 * price.points
    planted = {tuple(torch.nonzero(labels == label).flatten().tolist()) for label in range(4)}
    groups = group_heads(16, 4, price, equal_sizes=equal_sizes, generator=seeded(0))
    assert set(groups) == planted


@given(SEEDS)
def test_relabelling_heads_does_not_change_the_best_total(seed):
    price, relabelled = Counted(7, seed), Counted(7, seed)
    relabelled.points = price.points[torch.randperm(7, generator=seeded(seed + 1))]
    totals = [p.total(group_heads(7, 3, p, equal_sizes=False, generator=seeded(0))) for p in (price, relabelled)]
    assert totals[0] == pytest.approx(totals[1])


def test_same_seed_gives_the_same_groups():
    runs = [group_heads(16, 5, Counted(16, 9), equal_sizes=False, generator=seeded(4), restarts=3) for _ in range(2)]
    assert runs[0] == runs[1]


def test_prices_are_computed_once_a_group_and_never_for_a_head_alone():
    price = Counted(16, 0)
    steps = ladder(16, price)
    assert price.calls <= 330
    seen = []

    def recording(group: Group) -> float:
        seen.append(group)
        return price(group)

    group_heads(16, 4, recording, equal_sizes=False, generator=seeded(0))
    assert len(seen) == len(set(seen)) <= 1800
    assert all(len(group) > 1 for group in seen)
    assert len(steps) == 16


def test_memoised_price_does_not_depend_on_the_order_of_members():
    price = Counted(4, 0)
    shared = memoised(price)
    assert shared((2, 0)) == shared((0, 2))
    assert shared((3,)) == 0.0
    assert price.calls == 1


@given(st.integers(1, 10), SEEDS)
def test_ladder_is_nested_and_covers_every_count(num_heads, seed):
    steps = ladder(num_heads, Counted(num_heads, seed))
    assert list(steps) == list(range(num_heads, 0, -1))
    for count, groups in steps.items():
        assert_partition(groups, num_heads, count)
        if count > 1:
            wider = [set(group) for group in steps[count - 1]]
            assert all(any(set(group) <= other for other in wider) for group in groups)


@given(any_cases())
def test_contiguous_groups_are_runs_of_near_equal_size(case):
    num_heads, count = case
    groups = contiguous_groups(num_heads, count)
    assert_partition(groups, num_heads, count)
    assert [head for group in groups for head in group] == list(range(num_heads))
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_three_heads_in_two_contiguous_groups():
    assert contiguous_groups(3, 2) == ((0, 1), (2,))


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), group_tuples(n))), st.integers(1, 3))
def test_composed_map_reads_the_group_of_the_source_head(case, readers):
    num_heads, groups = case
    source_map = tuple(head for head in range(num_heads) for _ in range(readers))
    composed = compose(source_map, groups)
    assert all(source in groups[shared] for source, shared in zip(source_map, composed, strict=True))


@pytest.mark.parametrize("count", [0, 5])
def test_impossible_count_is_refused(count):
    with pytest.raises(PlanError, match="from 1 to 4"):
        group_heads(4, count, lambda group: 0.0, equal_sizes=False, generator=seeded(0))


def test_equal_groups_need_a_divisor():
    with pytest.raises(PlanError, match="remainder of 1"):
        group_heads(9, 2, lambda group: 0.0, equal_sizes=True, generator=seeded(0))
