"""Budgets: what is asked for is what is spent, or a PlanError says what could be asked for."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headfuse.errors import PlanError
from headfuse.planning.budget import gqa_count, head_plan, knapsack, parse_budget, uniform_counts
from headfuse.planning.grouping import HeadGroups, contiguous_groups


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("25%", Fraction(1, 4)),
        ("4x", Fraction(1, 4)),
        ("0.25", Fraction(1, 4)),
        (" 12.5 % ", Fraction(1, 8)),
        ("3x", Fraction(1, 3)),
        ("2.5x", Fraction(2, 5)),
        (".5", Fraction(1, 2)),
        ("100%", Fraction(1)),
        ("1x", Fraction(1)),
        ("1", Fraction(1)),
    ],
)
def test_budgets_are_exact_fractions(text, share):
    assert parse_budget(text) == share


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "above zero"),
        ("0%", "above zero"),
        ("0x", "above zero"),
        ("-25%", "above zero"),
        ("101%", "at most 100%"),
        ("25", "at most 100%"),
        ("0.5x", "at most 100%"),
        ("", "wanted a budget"),
        ("half", "wanted a budget"),
        ("nan", "wanted a budget"),
        ("1e-2", "wanted a budget"),
        ("4xx", "wanted a budget"),
        ("%", "wanted a budget"),
        ("١٠%", "wanted a budget"),
    ],
)
def test_nonsense_budgets_are_refused_in_one_line(text, reason):
    with pytest.raises(PlanError, match=reason) as caught:
        parse_budget(text)
    assert "25%" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_even_budget_gives_every_layer_the_same():
    assert uniform_counts([(16, 16)] * 8, Fraction(1, 4)) == [(4, 4)] * 8


def test_remainder_goes_to_keys_first_and_is_spaced_over_the_layers():
    source = [(3, 3)] * 4
    assert uniform_counts(source, Fraction(14, 24)) == [(2, 1), (2, 2), (2, 1), (2, 2)]
    assert uniform_counts(source, Fraction(10, 24)) == [(1, 1), (2, 1), (1, 1), (2, 1)]


@st.composite
def sources(draw: st.DrawFn) -> list[tuple[int, int]]:
    pair = st.tuples(st.integers(1, 12), st.integers(1, 12))
    return draw(
        st.one_of(st.lists(pair, min_size=1, max_size=8), st.builds(lambda p, n: [p] * n, pair, st.integers(1, 8)))
    )


@given(sources(), st.fractions(Fraction(1, 100), 1))
def test_counts_spend_the_budget_exactly_within_one_and_the_source(source, fraction):
    total = math.floor(fraction * sum(map(sum, source)))
    assume(total >= 2 * len(source))
    counts = uniform_counts(source, fraction)
    assert sum(map(sum, counts)) == total
    for chosen, available in zip(counts, source, strict=True):
        assert all(1 <= n <= most for n, most in zip(chosen, available, strict=True))


@given(st.integers(2, 12), st.integers(1, 8), st.fractions(Fraction(1, 12), 1))
def test_counts_of_a_uniform_source_differ_by_at_most_one(heads, layers, fraction):
    assume(math.floor(fraction * 2 * heads * layers) >= 2 * layers)
    flat = [n for pair in uniform_counts([(heads, heads)] * layers, fraction) for n in pair]
    assert max(flat) - min(flat) <= 1


def test_smallest_budget_in_the_message_is_itself_possible():
    source = [(3, 3)] * 4
    with pytest.raises(PlanError, match=r"below one head per layer: smallest budget is 33\.34%"):
        uniform_counts(source, Fraction(1, 4))
    assert uniform_counts(source, parse_budget("33.34%")) == [(1, 1)] * 4


def test_gqa_count_divides_the_heads():
    assert gqa_count([(16, 16)] * 2, 16, Fraction(1, 4)) == 4
    assert gqa_count([(3, 3)] * 2, 9, Fraction(1, 3)) == 1
    assert gqa_count([(8, 8)] * 2, 32, Fraction(1)) == 8


def test_unreachable_gqa_budget_names_the_reachable_ones():
    with pytest.raises(PlanError, match=r"reachable budgets: 33\.34% \(1 of 3\), 100% \(3 of 3\); or use target dha"):
        gqa_count([(3, 3)], 9, Fraction(2, 3))
    with pytest.raises(PlanError, match=r"12\.5% \(1 of 8\), 25% \(2 of 8\), 50% \(4 of 8\)"):
        gqa_count([(8, 8)], 8, Fraction(3, 8))


def test_gqa_needs_a_source_with_one_head_count():
    with pytest.raises(PlanError, match="use target dha"):
        gqa_count([(8, 4)], 8, Fraction(1, 2))


COSTS = st.dictionaries(st.integers(1, 5), st.floats(0, 10), min_size=1, max_size=4)


@given(st.lists(COSTS, min_size=1, max_size=5), st.integers(1, 20))
def test_knapsack_equals_brute_force(costs, budget):
    choices = [c for c in itertools.product(*costs) if sum(c) <= budget]

    def cost(choice) -> float:
        return sum(unit[n] for unit, n in zip(costs, choice, strict=True))

    if not choices:
        with pytest.raises(PlanError, match="need"):
            knapsack(costs, budget)
        return
    chosen = knapsack(costs, budget)
    assert sum(chosen) <= budget
    assert cost(chosen) == pytest.approx(min(map(cost, choices)))


def test_knapsack_spends_where_it_pays():
    assert knapsack([{1: 5.0, 2: 0.0}, {1: 1.0, 2: 0.0}], 3) == [2, 1]
    assert knapsack([{1: 0.0, 2: 0.0}], 2) == [1]


@pytest.mark.parametrize("budget", [-1, 0, 3])
def test_infeasible_knapsack_says_what_is_needed(budget):
    with pytest.raises(PlanError, match="need 4"):
        knapsack([{2: 0.0, 3: 0.0}, {2: 0.0}], budget)


def test_head_plan_composes_source_maps_with_groups():
    groups = HeadGroups(keys=((0, 2), (1,)), values=((0,), (1, 2)))
    plan = head_plan("dha", 8, [((0, 0, 1, 1, 2, 2), (0, 0, 1, 1, 2, 2))], [groups])
    assert plan.layers[0].key_map == (0, 0, 1, 1, 0, 0)
    assert plan.layers[0].value_map == (0, 0, 1, 1, 1, 1)
    assert plan.cached_heads() == 4


def test_groups_that_gqa_cannot_express_are_refused():
    uneven = contiguous_groups(3, 2)
    with pytest.raises(PlanError, match="groups of one size"):
        head_plan("gqa", 8, [((0, 1, 2), (0, 1, 2))], [HeadGroups(uneven, uneven)])
