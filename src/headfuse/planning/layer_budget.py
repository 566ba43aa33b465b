"""How many heads each layer keeps in DHA, from the losses that its search measured (arXiv 2406.06567, Sec 4.3).

A unit is the keys or the values of one layer, all in one pool. Groups have equal sizes there, so a unit keeps a
divisor of its heads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.errors import PlanError
from headfuse.planning.annealing import anneal_groups, within_distance
from headfuse.planning.budget import knapsack
from headfuse.planning.grouping import Group

# The share of its heads that every unit keeps, and the one that the highest losses are raised to, as far as possible.
MINIMUM, RAISED = 1 / 8, 1 / 2


def allowed_counts(num_heads: int) -> list[int]:
    """The counts that a unit may keep: divisors of its heads, from the largest that is at most the minimum share."""
    divisors = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
    least = max(count for count in divisors if count <= max(1, num_heads * MINIMUM))
    return [count for count in divisors if count >= least]


def greedy_counts(
    scores: Sequence[float],
    heads: Sequence[int],
    total: int,
    *,
    limit: float = 1 / 4,
) -> list[int]:
    """The paper's allocation (Algorithm 5): how many of its `heads` each unit keeps, `total` in all, exactly.

    A unit's score is its own fusion loss; more loss, more heads. Every unit starts at the `MINIMUM` share of its heads.
    The highest scores are raised to half of theirs, as far as the budget and `limit`, a share of the units, allow.
    What is left goes, a divisor at a time, to the highest score per head given.

    The paper describes the algorithm in prose, for 32 heads. Open there and chosen here: the minimum and the limit;
    that half replaces the minimum rather than adding to it; one pool for keys and values; divisors where the paper has
    16, 8 and 4; and that no step is taken after which the rest of the budget could not be spent to the last head.

    Raises PlanError if no choice of divisors meets the budget.
    """
    assert all(math.isfinite(score) and score >= 0 for score in scores), "fusion losses are finite and not negative"
    choices = [allowed_counts(num_heads) for num_heads in heads]
    _check_reachable(choices, total)
    counts = [options[0] for options in choices]

    def possible(unit: int, count: int) -> bool:
        rest = [[n for n in options if n >= least] for options, least in zip(choices, counts, strict=True)]
        rest[unit] = [n for n in choices[unit] if n >= count]
        return bool(_reachable(rest) >> total & 1)

    to_raise = math.floor(limit * len(heads))
    for unit in sorted(range(len(heads)), key=lambda u: (-scores[u], u)):
        half = max(n for n in choices[unit] if n <= max(counts[unit], RAISED * heads[unit]))
        if to_raise and half > counts[unit] and possible(unit, half):
            counts[unit] = half
            to_raise -= 1

    def need(unit: int) -> tuple[float, int, int]:
        return -scores[unit] / counts[unit], counts[unit], unit

    while sum(counts) < total:
        growing = sorted((unit for unit, n in enumerate(counts) if n < heads[unit]), key=need)
        steps = ((unit, min(n for n in choices[unit] if n > counts[unit])) for unit in growing)
        unit, count = next(step for step in steps if possible(*step))  # the total is reachable, so there is one
        counts[unit] = count
    assert sum(counts) == total
    return counts


def divisor_groups(distances: Float[Tensor, "n n"], *, generator: torch.Generator) -> dict[int, tuple[Group, ...]]:
    """The best groups found at every count that a unit may keep."""
    counts = allowed_counts(len(distances))
    return {count: anneal_groups(distances, count, generator=generator) for count in counts}


def divisor_costs(distances: Float[Tensor, "n n"], groupings: Mapping[int, tuple[Group, ...]]) -> dict[int, float]:
    """The fusion loss left within the groups at every count.

    `distances` are the pair losses of the search, means over all n source heads. Eq 6 divides by the size g of the
    group instead, hence a factor of n / g, the count. The sum is then the members' scatter about the mean that folding
    puts in their place, which makes groups of different sizes comparable.
    """
    return {count: within_distance(distances, groups) * count for count, groups in groupings.items()}


def knapsack_counts(
    distances: Sequence[Float[Tensor, "n n"]], total: int, *, generator: torch.Generator
) -> tuple[list[int], list[tuple[Group, ...]]]:
    """The counts with the least fusion loss left in all units together, and the groups that have it.

    Spends at most `total`, and less only where more heads would not lower the loss or no divisors fit. The paper calls
    its allocation dynamic programming and describes a greedy one (`greedy_counts`); this is what it says. Optimal over
    the groups that annealing found at each count. Raises PlanError if `total` is below every unit's minimum.
    """
    groupings = [divisor_groups(each, generator=generator) for each in distances]
    counts = knapsack([divisor_costs(each, found) for each, found in zip(distances, groupings, strict=True)], total)
    return counts, [found[count] for found, count in zip(groupings, counts, strict=True)]


def _reachable(choices: Iterable[Sequence[int]]) -> int:
    """The totals that one count per unit can have, as the bits of a number."""
    totals = 1
    for options in choices:
        shifted = 0
        for count in options:
            shifted |= totals << count
        totals = shifted
    return totals


def _check_reachable(choices: Sequence[Sequence[int]], total: int) -> None:
    totals = _reachable(choices)
    if total >= 0 and totals >> total & 1:
        return
    found = [n for n in range(totals.bit_length()) if totals >> n & 1]
    below, above = [n for n in found if n < total], [n for n in found if n > total]
    nearest = " or ".join(str(n) for n in below[-1:] + above[:1])
    raise PlanError(
        f"wanted {total} cached heads, got equal groups that reach {nearest} (from {found[0]} to "
        f"{found[-1]}); choose one of these"
    )
