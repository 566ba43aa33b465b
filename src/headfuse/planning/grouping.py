"""Groups of heads that will share one head, and the search for the cheapest ones.

A price says what it costs to let the heads of one group share a single head; the search knows nothing else, so the
same code serves every sharing method. A price can cost an eigen-decomposition, hence the memo everywhere.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from headfuse.errors import PlanError

Group = tuple[int, ...]
Price = Callable[[Group], float]

MAX_ENUMERATED = 3000  # partitions tried one by one instead of searched
MAX_PRICED = 1000  # groups that an enumeration may have to price
RESTARTS = 1
SCREENED = 16  # random starts judged by pairs of heads alone, for every one that is refined on true prices
TOLERANCE = 1e-12  # relative gain below which an exchange is rounding, not improvement


@dataclass(frozen=True)
class HeadGroups:
    """Partition of a layer's source key heads and of its source value heads; group g becomes shared head g."""

    keys: tuple[Group, ...]
    values: tuple[Group, ...]


def compose(source_map: tuple[int, ...], groups: tuple[Group, ...]) -> tuple[int, ...]:
    """The map of the query heads once source heads are grouped: `h` reads the group that holds `source_map[h]`."""
    shared = {head: index for index, group in enumerate(groups) for head in group}
    return tuple(shared[head] for head in source_map)


def contiguous_groups(num_heads: int, count: int) -> tuple[Group, ...]:
    """`count` runs of neighbouring heads, larger ones first, sizes differing by at most one (GQA's own grouping)."""
    _check_count(num_heads, count)
    size, longer = divmod(num_heads, count)
    ends = list(itertools.accumulate(size + (index < longer) for index in range(count)))
    return tuple(tuple(range(start, end)) for start, end in zip([0, *ends], ends, strict=False))


def memoised(price: Price) -> Price:
    """`price` of the sorted group, computed once a group; a head alone costs nothing and is never priced.

    Wrap a price once to share its values between `group_heads` and `ladder` at several counts.
    """
    known: dict[Group, float] = {}

    def lookup(group: Group) -> float:
        key = tuple(sorted(group))
        if len(key) == 1:
            return 0.0
        if key not in known:
            known[key] = float(price(key))
        return known[key]

    return lookup


def ladder(num_heads: int, price: Price) -> dict[int, tuple[Group, ...]]:
    """Nested groupings for every count from `num_heads` to 1: each merges the two groups whose union costs least more.

    About `num_heads ** 2` prices for all counts together, which is what a knapsack over many layers can afford.
    """
    return {len(groups): groups for groups in _merges(num_heads, memoised(price))}


def group_heads(
    num_heads: int,
    count: int,
    price: Price,
    *,
    equal_sizes: bool,
    generator: torch.Generator,
    restarts: int = RESTARTS,
) -> tuple[Group, ...]:
    """`count` groups of the heads 0..num_heads-1 with the least sum of prices; members and groups ascending.

    Exact where few partitions exist. Otherwise exchanges of heads between two groups (swaps, and single moves unless
    `equal_sizes`) until none helps, from a greedy start and from `restarts` random ones: those that ended best among
    many when judged by the prices of pairs alone, which are few. Never worse than contiguous groups. Raises PlanError
    if there are no such groups.
    """
    _check_count(num_heads, count)
    if equal_sizes and num_heads % count:
        raise PlanError(
            f"wanted {count} equal groups of {num_heads} heads, got a remainder of {num_heads % count}; "
            f"choose a count that divides {num_heads}"
        )
    price = memoised(price)
    size = num_heads // count if equal_sizes else None
    if _enumerable(num_heads, count, size):
        return min(_partitions(tuple(range(num_heads)), count, size), key=_total(price))
    pairs, refine = _from_pairs(price), partial(_refined, moves=size is None)
    drawn = [_random(num_heads, count, size, generator) for _ in range(restarts * SCREENED)]
    screened = sorted({refine(groups, pairs) for groups in drawn}, key=_total(pairs))
    starts = {_greedy(num_heads, count, size, price), *screened[:restarts]}
    found = [refine(groups, price) for groups in sorted(starts)]
    return min(*found, contiguous_groups(num_heads, count), key=_total(price))


def _check_count(num_heads: int, count: int) -> None:
    if not 1 <= count <= num_heads:
        raise PlanError(f"wanted {count} groups of {num_heads} heads; choose a count from 1 to {num_heads}")


def _total(price: Price) -> Callable[[tuple[Group, ...]], float]:
    return lambda groups: sum(price(group) for group in groups)


def _from_pairs(price: Price) -> Price:
    """A stand-in for `price` that only prices pairs: their sum times 2 / g, exact for g unrelated heads."""
    return memoised(lambda group: sum(map(price, itertools.combinations(group, 2))) * 2 / len(group))


def _ordered(groups: Iterable[Iterable[int]]) -> tuple[Group, ...]:
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _enumerable(num_heads: int, count: int, size: int | None) -> bool:
    """Whether trying every partition is cheap, both in partitions and in groups to price."""
    if size is not None:
        partitions = math.factorial(num_heads) // (math.factorial(size) ** count * math.factorial(count))
        return partitions <= MAX_ENUMERATED and math.comb(num_heads, size) <= MAX_PRICED
    signed = ((-1) ** (count - j) * math.comb(count, j) * j**num_heads for j in range(count + 1))
    priced = sum(math.comb(num_heads, r) for r in range(2, num_heads - count + 2))
    return sum(signed) // math.factorial(count) <= MAX_ENUMERATED and priced <= MAX_PRICED


def _partitions(heads: Group, count: int, size: int | None) -> Iterator[tuple[Group, ...]]:
    """Every partition of `heads` into `count` groups, of one `size` if given; each once, in canonical order."""
    if count == 1:
        yield (heads,)
        return
    sizes = range(1, len(heads) - count + 2) if size is None else (size,)
    for width in sizes:
        for others in itertools.combinations(heads[1:], width - 1):
            rest = tuple(head for head in heads[1:] if head not in others)
            for groups in _partitions(rest, count - 1, size):
                yield ((heads[0], *others), *groups)


def _merges(num_heads: int, price: Price) -> Iterator[tuple[Group, ...]]:
    """Agglomerative clustering: all heads alone, then one merge a step."""
    groups = contiguous_groups(num_heads, num_heads)
    yield groups
    while len(groups) > 1:
        left, right = min(
            itertools.combinations(groups, 2),
            key=lambda pair: price(pair[0] + pair[1]) - price(pair[0]) - price(pair[1]),
        )
        groups = _ordered([group for group in groups if group not in (left, right)] + [left + right])
        yield groups


def _greedy(num_heads: int, count: int, size: int | None, price: Price) -> tuple[Group, ...]:
    """Unequal groups by merging; equal ones filled one after the other, each from its cheapest pair."""
    if size is None:
        return next(groups for groups in _merges(num_heads, price) if len(groups) == count)
    left, groups = set(range(num_heads)), []
    while left:
        group: Group = ()
        while len(group) < size:
            grow = 2 if not group and size > 1 else 1
            candidates = (group + added for added in itertools.combinations(sorted(left), grow))
            group = min(candidates, key=price)
            left -= set(group)
        groups.append(group)
    return _ordered(groups)


def _random(num_heads: int, count: int, size: int | None, generator: torch.Generator) -> tuple[Group, ...]:
    """A random partition; unequal sizes come from random cuts of a random order."""
    order = torch.randperm(num_heads, generator=generator).tolist()
    if size is None:
        cuts = sorted((torch.randperm(num_heads - 1, generator=generator)[: count - 1] + 1).tolist())
    else:
        cuts = list(range(size, num_heads, size))
    return _ordered(order[start:end] for start, end in zip([0, *cuts], [*cuts, num_heads], strict=True))


def _refined(groups: tuple[Group, ...], price: Price, *, moves: bool) -> tuple[Group, ...]:
    """Take the best exchange between two groups, for all pairs of groups in turn, until no pair has a gain."""
    current, improved = list(groups), True
    while improved:
        improved = False
        for a, b in itertools.combinations(range(len(current)), 2):
            left, right = min(
                _exchanges(current[a], current[b], moves=moves),
                key=lambda pair: price(pair[0]) + price(pair[1]),
            )
            before, after = price(current[a]) + price(current[b]), price(left) + price(right)
            if after < before - TOLERANCE * (abs(before) + abs(after)):
                current[a], current[b], improved = left, right, True
    return _ordered(current)


def _exchanges(left: Group, right: Group, *, moves: bool) -> Iterator[tuple[Group, Group]]:
    """The pair itself, every swap of one member for one, and every single move that leaves no group empty."""
    yield left, right
    for a, b in itertools.product(left, right):
        yield (*_without(left, a), b), (*_without(right, b), a)
    if moves and len(left) > 1:
        yield from ((_without(left, a), (*right, a)) for a in left)
    if moves and len(right) > 1:
        yield from (((*left, b), _without(right, b)) for b in right)


def _without(group: Group, member: int) -> Group:
    return tuple(head for head in group if head != member)
