"""Equal groups of heads by simulated annealing over their distances (arXiv 2406.06567, Algorithm 4)."""

import itertools
import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headfuse.errors import PlanError
from headfuse.planning.grouping import Group, contiguous_groups

Form = Literal["repaired", "printed"]

RESTARTS = 4
SWAPS = 20_000  # tried in every restart
SWAPS_PER_PAIR = 20  # and at least so many for every ordered pair of heads
HOT, COLD = 1.0, 1e-3  # the repaired form's temperatures, in standard deviations of a distance


def anneal_groups(
    distances: Float[Tensor, "n n"], count: int, *, form: Form = "repaired", generator: torch.Generator
) -> tuple[Group, ...]:
    """`count` groups of equal size with small distances between their members; members and groups ascending.

    "printed" is Algorithm 4 to the letter: it starts at temperature 100, cools by 0.9 at each of its 110 swaps, returns
    the state it ends in and maximises the distances, though the text wants them small. On planted groups that is worse
    than chance. "repaired" minimises them, measured in their standard deviation, from temperature 1, over at least
    20,000 swaps in each of several restarts, and returns the best state seen.

    Raises PlanError if `count` does not divide the heads.
    """
    num_heads = len(distances)
    if not 1 <= count <= num_heads or num_heads % count:
        raise PlanError(
            f"wanted {count} equal groups of {num_heads} heads; choose a count that divides {num_heads}: "
            f"{', '.join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)}"
        )
    assert torch.isfinite(distances).all(), "distances of heads must be finite"
    matrix = (distances + distances.mT).detach().double().cpu() / 2
    matrix.fill_diagonal_(0.0)
    if count in (1, num_heads):
        return contiguous_groups(num_heads, count)
    if form == "printed":
        _, (_, labels) = _anneal(matrix, count, _printed_cooling(), generator)
        return _groups(labels, count)
    between = matrix[~torch.eye(num_heads, dtype=torch.bool)]
    scale = between.std().item()
    scores = -matrix / (scale if scale > 0 else 1.0)
    swaps = max(SWAPS, SWAPS_PER_PAIR * num_heads**2)
    cooling = [HOT * (COLD / HOT) ** (swap / swaps) for swap in range(swaps)]
    found = (_anneal(scores, count, cooling, generator)[0] for _ in range(RESTARTS))
    return _groups(max(found, key=lambda state: state[0])[1], count)


def within_distance(distances: Float[Tensor, "n n"], groups: Iterable[Group]) -> float:
    """The sum of the distances between members of a group, each pair once."""
    matrix = distances.tolist()
    return sum(matrix[a][b] for group in groups for a, b in itertools.combinations(group, 2))


State = tuple[float, list[int]]  # score, and the group of every head


def _printed_cooling() -> list[float]:
    temperatures, temperature = [], 100.0
    while temperature > 1e-3:
        temperatures.append(temperature)
        temperature *= 0.9
    return temperatures


def _anneal(scores: Tensor, count: int, temperatures: list[float], generator: torch.Generator) -> tuple[State, State]:
    """The best and the last state of one annealing that maximises the scores within groups."""
    num_heads, swaps = len(scores), len(temperatures)
    labels = (torch.randperm(num_heads, generator=generator) % count).tolist()
    members = torch.nn.functional.one_hot(torch.tensor(labels), count).double()
    pull = (scores @ members).tolist()  # [n, groups]: what a head would score in each group; kept up to date
    rows: list[list[float]] = scores.tolist()
    picks = torch.randint(num_heads, (swaps, 2), generator=generator).tolist()
    chances = torch.rand(swaps, generator=generator, dtype=torch.float64).tolist()
    score = sum(pull[head][group] for head, group in enumerate(labels)) / 2
    best = (score, labels.copy())
    for (a, b), chance, temperature in zip(picks, chances, temperatures, strict=True):
        left, right = labels[a], labels[b]
        if left == right:
            continue
        gain = pull[a][right] - pull[a][left] + pull[b][left] - pull[b][right] - 2 * rows[a][b]
        if gain <= 0 and math.exp(gain / temperature) <= chance:
            continue
        labels[a], labels[b] = right, left
        for towards, of_a, of_b in zip(pull, rows[a], rows[b], strict=True):  # the rows are symmetric
            change = of_b - of_a
            towards[left] += change
            towards[right] -= change
        score += gain
        if score > best[0]:
            best = (score, labels.copy())
    return best, (score, labels)


def _groups(labels: list[int], count: int) -> tuple[Group, ...]:
    return tuple(sorted(tuple(h for h, label in enumerate(labels) if label == group) for group in range(count)))
