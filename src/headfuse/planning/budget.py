"""From a cache budget to head counts, and from groups to a head plan.

The unit of every budget is the cached head: one key head or one value head of one layer.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np
from pydantic import ValidationError

from headfuse.errors import PlanError
from headfuse.planning.grouping import HeadGroups, compose
from headfuse.planning.plan import HeadPlan, LayerPlan, Target

_BUDGET = re.compile(r"(-?(?:[0-9]{1,9}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}))\s*(%|x?)")
_EXAMPLES = "write a share such as 25%, 4x (a quarter) or 0.25"


def parse_budget(text: str) -> Fraction:
    """The share of the source cache that may stay, from "25%", "4x" or "0.25"; above 0, at most 1.

    Raises PlanError for anything else.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None:
        raise PlanError(f"wanted a budget, got {text!r}; {_EXAMPLES}")
    number, unit = Fraction(match[1]), match[2]
    if number <= 0:
        raise PlanError(f"wanted a budget above zero, got {text!r}; {_EXAMPLES}")
    share = {"%": number / 100, "x": 1 / number, "": number}[unit]
    if share > 1:
        raise PlanError(f"wanted a budget of at most 100%, got {text!r} ({_percent(share)}); {_EXAMPLES}")
    return share


def share_of(budget: Fraction | float | str) -> Fraction:
    """The share of the source cache that a number, or what `parse_budget` takes, says; PlanError for others."""
    if isinstance(budget, str):
        return parse_budget(budget)
    try:
        share = Fraction(budget if isinstance(budget, Fraction) else str(budget))  # 0.3 is 3/10, not the nearest float
    except ValueError:
        share = Fraction(0)
    if not 0 < share <= 1:
        raise PlanError(f"wanted a share above 0 and at most 1, got {budget}; {_EXAMPLES}")
    return share


def uniform_counts(source_heads: Sequence[tuple[int, int]], fraction: Fraction) -> list[tuple[int, int]]:
    """(key heads, value heads) of every layer, in proportion to the source's and spending the budget exactly.

    `source_heads` are the source's (key heads, value heads), layer by layer; floor(fraction * their sum) heads are
    given out. What does not divide evenly goes first where the share is furthest from whole, there first to keys, and
    is spaced evenly over the layers. Keys come first because sharing them costs more: twice as much on the 30M
    reference at 25%, and 1.33 against 0.99 nats on SmolLM2 at half its cache (LOG.md).

    Raises PlanError below one head per layer and kind.
    """
    sources = [count for pair in source_heads for count in pair]  # unit 2l: keys of layer l, 2l + 1: its values
    total = math.floor(fraction * sum(sources))
    if total < len(sources):
        smallest = Fraction(len(sources), sum(sources))
        raise PlanError(
            f"wanted {_percent(fraction)} of {sum(sources)} cached heads, got {total} for {len(sources)} key and "
            f"value slots, below one head per layer: smallest budget is {_percent(smallest)}"
        )
    shares = [fraction * count for count in sources]
    counts = [max(1, math.floor(share)) for share in shares]
    while sum(counts) > total:  # only where the one head that every layer needs exceeds its share
        over = max((u for u in range(len(counts)) if counts[u] > 1), key=lambda u: counts[u] - shares[u])
        counts[over] -= 1

    def rank(unit: int) -> tuple[Fraction, bool]:
        return counts[unit] - shares[unit], unit % 2 == 1

    short = sorted((unit for unit in range(len(counts)) if counts[unit] < shares[unit]), key=rank)
    for tier in [list(units) for _, units in itertools.groupby(short, key=rank)]:
        for unit in _spaced(tier, total - sum(counts)):
            counts[unit] += 1
    return list(zip(counts[::2], counts[1::2], strict=True))


def gqa_count(source_heads: Sequence[tuple[int, int]], num_query_heads: int, fraction: Fraction) -> int:
    """The one count of key and value heads that target gqa allows within the budget, floor(fraction * source heads).

    Groups must be equal, so the count divides the source's key/value heads and the query heads. Raises PlanError
    naming the reachable budgets if it does not, or if the source itself is no grouped-query model.
    """
    found = {count for pair in source_heads for count in pair}
    if len(found) != 1:
        raise PlanError(
            f"target gqa wants one head count for keys and values of all layers, got {sorted(found)}; use target dha"
        )
    source = found.pop()
    count = math.floor(fraction * source)
    reachable = [n for n in range(1, source + 1) if source % n == 0 and num_query_heads % n == 0]
    if count not in reachable:
        budgets = ", ".join(f"{_percent(Fraction(n, source))} ({n} of {source})" for n in reachable)
        raise PlanError(
            f"target gqa wants equal groups of {source} key/value heads, got a budget of {_percent(fraction)} "
            f"({count} heads); reachable budgets: {budgets}; or use target dha"
        )
    return count


def knapsack(costs: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    """The head count of every unit with the least total cost, at most `budget` heads together; exact.

    A unit is the keys or the values of one layer; its mapping gives the cost of each count it may take. Dynamic
    programming over (unit, heads spent); equal costs go to fewer heads. Raises PlanError if no choice fits.
    """
    least = np.full(budget + 1 if budget >= 0 else 1, np.inf)
    least[0] = 0.0  # least[b]: cost of the units so far with exactly b heads
    chosen = []
    for unit in costs:
        reached, choice = np.full_like(least, np.inf), np.zeros(len(least), dtype=np.int64)
        for count, cost in sorted(unit.items()):
            if count >= len(least):
                continue
            candidate = np.full_like(least, np.inf)
            candidate[count:] = least[: len(least) - count] + cost
            better = candidate < reached
            reached[better], choice[better] = candidate[better], count
        least = reached
        chosen.append(choice)
    spent = int(least.argmin())
    if not np.isfinite(least[spent]) or budget < 0:
        smallest = sum(min(unit) for unit in costs)
        raise PlanError(f"wanted at most {budget} cached heads, got layers that need {smallest}; raise the budget")
    counts = []
    for choice in reversed(chosen):
        counts.append(int(choice[spent]))
        spent -= counts[-1]
    return counts[::-1]


def head_plan(
    target: Target,
    head_dim: int,
    source_maps: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    groups: Sequence[HeadGroups],
) -> HeadPlan:
    """The plan of a model whose layer l had the (key, value) maps `source_maps[l]` and groups its heads by `groups[l]`.

    Raises PlanError if the target cannot express the groups.
    """
    try:
        layers = tuple(
            LayerPlan(key_map=compose(key_map, layer.keys), value_map=compose(value_map, layer.values))
            for (key_map, value_map), layer in zip(source_maps, groups, strict=True)
        )
        return HeadPlan(target=target, head_dim=head_dim, layers=layers)
    except ValidationError as error:
        raise PlanError(f"{error.errors()[0]['msg']}; choose other groups or target dha") from error


def _spaced(units: Sequence[int], count: int) -> Iterator[int]:
    """`count` of the units at even distances; all of them if there are no more."""
    count = min(count, len(units))
    for index, unit in enumerate(units):
        if (index + 1) * count // len(units) > index * count // len(units):
            yield unit


def _percent(share: Fraction) -> str:
    """In percent, rounded up so that the budget still suffices when typed back."""
    return f"{math.ceil(share * 10_000) / 100:g}%"
