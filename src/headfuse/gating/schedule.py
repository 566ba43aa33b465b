"""When gates close: the target, the penalty, and the projection that makes them obey it (papers/align.md 1.11).

Functions of the step, which Python knows, and of tensors, which it does not look at: nothing here waits for a device.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# What is left of the distance to a wall after a step of the projection, at least and at most.
FASTEST, SLOWEST, SLOWEST_CLOSED = 0.6, 0.999, 0.8
# The least share of a step's start that damping keeps.
LEAST_DAMPING = 0.002


@dataclass(frozen=True)
class Schedule:
    """Of `steps`, the share `warmup` brings the target from 0 to 1, and from the share `hard` on all gates are 0."""

    steps: int
    warmup: float = 0.3
    hard: float = 0.8

    def target(self, step: int) -> float:
        """The share of gates that should be 0 at a step, counted from 0."""
        return min(1.0, step / max(1.0, self.warmup * self.steps))

    def progress(self, step: int) -> float:
        """The step relative to the first one with all gates at 0."""
        return step / max(1.0, self.hard * self.steps)

    def closed(self, step: int) -> bool:
        """Whether all gates are exactly 0."""
        return step >= self.hard * self.steps


def penalty(sparsity: Float[Tensor, ""], target: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The paper's code: `|s - t| + (|s - t| + 1e-6)^2`, whose two multipliers exist there and are not used."""
    gap = (sparsity - target).abs()
    return gap + (gap + 1e-6) ** 2


def projected(
    logits: Float[Tensor, " M"], sparsity: Float[Tensor, ""], *, target: float, progress: float, wall: float
) -> Float[Tensor, " M"]:
    """`constrain_sparsity` of the paper's code, the real driver: the smallest logits sink, the others rise.

    As long as too few gates are expected to be 0, the `M t + 1` smallest logits go towards `-wall`, the faster the
    more are missing; all of a higher rank go towards `+wall`. So gates end at either wall, in the order of the logits,
    and the training loss decides the order alone.
    """
    count = len(logits)
    sinking = min(int(count * target + 1), count)
    haste = (target - sparsity) * math.exp(math.sqrt(progress))
    slowest = SLOWEST if progress < 1 else SLOWEST_CLOSED
    ranked = logits.sort().values
    last = ranked[sinking - 1]
    sunk = (-wall + (logits + wall) * (1 - haste).clamp(FASTEST, slowest)).clamp_min(-wall)
    moved = torch.where((haste > 0) & (last > -wall) & (logits <= last), sunk, logits)
    if sinking + 1 >= count:
        return moved
    first = moved.sort().values[sinking]
    risen = (wall + (moved - wall) * (1 + haste).clamp_max(slowest)).clamp_max(wall)
    return torch.where((first < wall) & (moved >= first), risen, moved)


def damping(gap: Float[Tensor, ""], progress: float) -> Float[Tensor, ""]:
    """How much of the logits at the start of a step its end keeps; `gap` is |s - t|."""
    return gap.clamp(max(LEAST_DAMPING, min(1.0, progress) ** 5 / 2), 1.0)
