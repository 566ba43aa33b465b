"""Decoding without a GPU against the specification in fp64, whichever way the maps and the rows let it go."""

import pytest
import torch
from problems import decoding, folded, paged, shuffled_table

from headfuse.ops.decoupled_attention import Rows, Scoring, head_maps, naive_attention
from headfuse.ops.decoupled_attention.grouped import grouped_decode
from headfuse.ops.decoupled_attention.scoring import PLAIN

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
EQUAL, MIXED = [0, 0, 1, 1, 2, 2, 3, 3], [1, 0, 2, 1, 1, 0, 2, 1]
MAPS = {
    "unshared": (list(range(8)),) * 2,
    "equal-groups": (EQUAL, EQUAL),
    "equal-groups-mixed": ([1, 3, 2, 0, 0, 2, 3, 1],) * 2,
    "unequal-groups": (MIXED, MIXED),
    "equal-groups-apart": (EQUAL, [0, 0, 0, 0, 1, 1, 1, 1]),
    "groups-apart": (MIXED, [2, 2, 0, 4, 1, 3, 0, 2]),
    "one-key-head": ([0] * 8, MIXED),
    "one-value-head": (MIXED, [0] * 8),
}
every_map = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)


def problem_of(maps, **options):
    return decoding((8, max(maps[0]) + 1, max(maps[1]) + 1), maps=maps, **options)


def check(problem, *, scoring=PLAIN, cache=None, table=None):
    options = {"lengths": problem.lengths, "starts": problem.starts, "scoring": scoring}
    expected = naive_attention(*problem.naive_inputs(), **options)[0][:, :, 0]
    key, value = cache or (problem.key, problem.value)
    rows = Rows(problem.lengths, problem.starts, table)
    out = grouped_decode(problem.query, key, value, problem.maps, rows, scoring=scoring)
    error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < TOLERANCE[problem.query.dtype], error
    assert out.dtype == problem.query.dtype
    assert out.shape == problem.query.shape


@every_map
@pytest.mark.parametrize("lengths", [(150, 77), (90, 90), (600,)], ids=["ragged", "even", "one"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_map(maps, lengths, dtype, device):
    problem = problem_of(maps, lengths=lengths, capacity=max(lengths) + 7, dtype=dtype, device=device)
    check(problem)
    check(problem, cache=(folded(problem.key), folded(problem.value)))


@every_map
@pytest.mark.parametrize("lengths", [(0, 1, 40), (0, 0)])
def test_rows_of_no_tokens_give_zeros(maps, lengths, device):
    check(problem_of(maps, lengths=lengths, capacity=64, device=device))


@every_map
@pytest.mark.parametrize("starts", [(0, 67), (20, 20), (90, 95)], ids=["ragged", "even", "past-the-end"])
def test_rows_that_start_late(maps, starts, device):
    problem = problem_of(maps, lengths=(90, 90), device=device)
    problem.starts = torch.tensor(starts, dtype=torch.int32, device=device)
    for row, start in enumerate(starts):
        problem.key[row, :, :start] = problem.value[row, :, :start] = float("nan")
    check(problem)


@every_map
@pytest.mark.parametrize("lengths", [(150, 77), (90, 90)], ids=["ragged", "even"])
@pytest.mark.parametrize(
    "scoring", [Scoring(softcap=2.0), Scoring(window=40), Scoring(scale=0.5), Scoring(0.5, softcap=5.0, window=7)]
)
def test_scale_soft_cap_and_window(maps, lengths, scoring, device):
    check(problem_of(maps, lengths=lengths, device=device), scoring=scoring)


@every_map
@pytest.mark.parametrize("fold", [False, True], ids=["head-major", "folded"])
def test_pages_in_any_order(maps, fold, device):
    problem = problem_of(maps, device=device)
    table = shuffled_table(2, 5, device)
    cache = paged(problem.key, 32, table, folded=fold), paged(problem.value, 32, table, folded=fold)
    check(problem, cache=cache, table=table)


@pytest.mark.parametrize("heads", [(1, 1, 1), (5, 2, 3), (20, 4, 1), (32, 2, 14), (32, 6, 10)])
def test_head_counts(heads, device):
    check(decoding(heads, lengths=(50, 33), dim=16, device=device))


@every_map
def test_a_query_that_is_a_view_is_left_as_it_is(maps, device):
    problem = problem_of(maps, device=device)
    wide = torch.randn(2, 8, 3, 32, device=device)
    wide[:, :, 1] = problem.query
    problem.query, before = wide[:, :, 1], wide.clone()
    check(problem)
    assert torch.equal(wide, before)


def test_only_equal_groups_of_neighbours_are_consecutive():
    assert [name for name, maps in MAPS.items() if head_maps(*maps).consecutive] == [
        "unshared",
        "equal-groups",
        "equal-groups-apart",
    ]
    assert not head_maps([0, 0, 0, 1, 1], [0] * 5).consecutive
    assert not head_maps([0] * 5, [1, 0, 2, 3, 4]).consecutive
