"""Annealed groups: equal, canonical, optimal where that is known; the printed algorithm is there and is worse."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfuse.errors import PlanError
from headfuse.planning.annealing import anneal_groups, within_distance
from headfuse.planning.grouping import Group
from strategies import seeded

SEEDS = st.integers(0, 2**16)


def random_distances(num_heads: int, seed: int) -> torch.Tensor:
    matrix = torch.rand(num_heads, num_heads, generator=seeded(seed))
    return (matrix + matrix.mT).fill_diagonal_(0.0) / 2


def planted(num_heads: int, count: int, seed: int) -> tuple[torch.Tensor, tuple[Group, ...]]:
    """Near heads in random groups, far ones elsewhere, and a third of that as noise."""
    labels = torch.randperm(num_heads, generator=seeded(seed)) % count
    near = torch.where(labels[:, None] == labels, 0.2, 1.0)
    groups = tuple(sorted(tuple(torch.nonzero(labels == g).flatten().tolist()) for g in range(count)))
    return (near + 0.3 * random_distances(num_heads, seed)).fill_diagonal_(0.0), groups


def brute_force(distances: torch.Tensor, size: int) -> float:
    def best(left: tuple[int, ...]) -> float:
        if not left:
            return 0.0
        first, *rest = left
        return min(
            within_distance(distances, [(first, *others)]) + best(tuple(h for h in rest if h not in others))
            for others in itertools.combinations(rest, size - 1)
        )

    return best(tuple(range(len(distances))))


@given(
    st.sampled_from([(1, 1), (4, 2), (6, 3), (6, 6), (8, 1), (12, 4)]), SEEDS, st.sampled_from(["printed", "repaired"])
)
def test_groups_are_an_equal_partition_in_canonical_order(case, seed, form):
    num_heads, count = case
    groups = anneal_groups(random_distances(num_heads, seed), count, form=form, generator=seeded(seed))
    assert len(groups) == count
    assert {len(group) for group in groups} == {num_heads // count}
    assert sorted(head for group in groups for head in group) == list(range(num_heads))
    assert groups == tuple(sorted(tuple(sorted(group)) for group in groups))


@pytest.mark.parametrize(("num_heads", "count"), [(4, 2), (6, 2), (6, 3), (8, 2), (8, 4), (9, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_few_heads_are_grouped_optimally(num_heads, count, seed):
    distances = random_distances(num_heads, seed)
    groups = anneal_groups(distances, count, generator=seeded(seed))
    assert within_distance(distances, groups) == pytest.approx(brute_force(distances, num_heads // count))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_planted_groups_are_found_at_any_scale(scale):
    distances, groups = planted(32, 8, 0)
    assert anneal_groups(distances * scale + 5 * scale, 8, generator=seeded(0)) == groups


def test_the_printed_algorithm_is_worse_than_chance_and_still_poor_with_its_sign_repaired():
    distances, groups = planted(32, 8, 0)
    optimum = within_distance(distances, groups)
    chance = distances.sum().item() / 2 * 3 / 31  # each head has 3 of its 31 others in its group

    def printed(given: torch.Tensor) -> float:
        runs = [anneal_groups(given, 8, form="printed", generator=seeded(seed)) for seed in range(10)]
        return sum(within_distance(distances, run) for run in runs) / len(runs)

    assert printed(distances) > chance
    assert optimum * 2 < printed(-distances) < chance
    assert optimum < 0.4 * chance


def test_same_seed_gives_the_same_groups():
    distances = random_distances(16, 1)
    assert anneal_groups(distances, 4, generator=seeded(3)) == anneal_groups(distances, 4, generator=seeded(3))


def test_equal_distances_are_no_obstacle():
    assert len(anneal_groups(torch.ones(6, 6), 3, generator=seeded(0))) == 3


def test_distances_are_read_and_not_changed():
    distances = torch.ones(6, 6)
    anneal_groups(distances, 3, generator=seeded(0))
    assert torch.equal(distances, torch.ones(6, 6))


@pytest.mark.parametrize("count", [0, 4, 12])
@pytest.mark.parametrize("form", ["printed", "repaired"])
def test_a_count_that_does_not_divide_the_heads_is_refused(count, form):
    with pytest.raises(PlanError, match="choose a count that divides 6: 1, 2, 3, 6"):
        anneal_groups(torch.zeros(6, 6), count, form=form, generator=seeded(0))
