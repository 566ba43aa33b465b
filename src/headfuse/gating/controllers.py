"""Who closes the gates: the paper's projection, a Lagrangian as in LLM-Shearing, or a plain ramp."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headfuse.gating.gates import Gates, noise_of, sparsity
from headfuse.gating.schedule import Schedule, damping, penalty, projected


class Controller(nn.Module):
    """What happens to gates around a step, and what the loss is charged for those that are still open.

    The gates are a part of the objective and not of the controller, whose own parameters are `multipliers`.
    """

    # Whether the training loss moves the logits.
    learned = True

    def __init__(self, gates: Gates, schedule: Schedule, *, seed: int) -> None:
        super().__init__()
        self._gates, self.schedule, self.seed = (gates,), schedule, seed

    @property
    def gates(self) -> Gates:
        """The gates that are closed."""
        return self._gates[0]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Set what the step depends on: noise, target, penalty, and whether all gates are closed."""
        gates, closed = self.gates, self.schedule.closed(step)
        noise = noise_of(len(gates.noise), gates.kind, seed=self.seed, step=step)
        gates.noise.copy_(torch.zeros_like(noise) if closed else noise)
        gates.target.fill_(self.schedule.target(step))
        gates.allowed.fill_(float(not closed))
        gates.pressure.fill_(float(not closed))

    def after_step(self) -> None:
        """Keep the logits where they belong."""

    def penalty(self, sparsity: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What is added to the loss."""
        return self.gates.pressure * penalty(sparsity, self.gates.target)

    def multipliers(self) -> Sequence[nn.Parameter]:
        """Parameters that climb the loss."""
        return ()


class Projection(Controller):
    """The paper's code: a penalty, a projection of the logits before every step, damping behind it.

    The sparsity that the projection goes by is that of the logits as they are now; the code's was measured in the
    forward pass before. Made for thousands of steps: it closes gates by at most 40% of the way to the wall a step, and
    the fewer steps there are, the later than the target.
    """

    start: Tensor

    def __init__(self, gates: Gates, schedule: Schedule, *, seed: int) -> None:
        super().__init__(gates, schedule, seed=seed)
        self.progress = 0.0
        self.register_buffer("start", gates.logits.detach().clone(), persistent=False)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Project the logits; nothing is known of them before the first step."""
        super().before_step(step)
        gates, schedule = self.gates, self.schedule
        self.progress = schedule.progress(step)
        if step:
            now, target = sparsity(gates.logits, gates.kind), schedule.target(step)
            moved = projected(gates.logits, now, target=target, progress=self.progress, wall=gates.kind.wall)
            gates.logits.copy_(moved)
        self.start.copy_(gates.logits)

    @torch.no_grad()
    def after_step(self) -> None:
        """Take back a part of what the optimizer did, more of it the further from the target and the later."""
        gates = self.gates
        gap = (sparsity(self.start, gates.kind) - gates.target).abs()
        gates.logits.lerp_(self.start, damping(gap, self.progress))


class Lagrangian(Controller):
    """The textbook form, `l1 (s - t) + l2 (s - t)^2` with multipliers that climb (LLM-Shearing, arXiv 2310.06694)."""

    values: nn.Parameter

    def __init__(self, gates: Gates, schedule: Schedule, *, seed: int) -> None:
        super().__init__(gates, schedule, seed=seed)
        self.values = nn.Parameter(torch.zeros(2))

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the logits within their walls."""
        wall = self.gates.kind.wall
        self.gates.logits.clamp_(-wall, wall)

    def penalty(self, sparsity: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What is added to the loss."""
        gap = sparsity - self.gates.target
        return self.gates.pressure * (self.values.to(gap) * torch.stack([gap, gap**2])).sum()

    def multipliers(self) -> Sequence[nn.Parameter]:
        """Both."""
        return (self.values,)


class Ramp(Controller):
    """No learning: gates go from 1 to 0 one after the other in an order drawn by the seed, as many as the target says.

    The fair simple substitute for masks (papers/align.md 4): whether learned gates earn anything is their distance to
    this.
    """

    learned = False
    order: Tensor

    def __init__(self, gates: Gates, schedule: Schedule, *, seed: int) -> None:
        super().__init__(gates, schedule, seed=seed)
        gates.logits.requires_grad_(False)
        drawn = torch.randperm(len(gates.noise), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("order", drawn, persistent=False)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Put every logit at the wall where it belongs, without noise."""
        super().before_step(step)
        gates, wall = self.gates, self.gates.kind.wall
        gates.noise.zero_()
        off = self.order < int(len(self.order) * self.schedule.target(step))
        gates.logits.copy_(torch.where(off, -wall, wall))

    def penalty(self, sparsity: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Nothing."""
        return torch.zeros_like(sparsity)


CONTROLLERS: Mapping[str, type[Controller]] = {"projection": Projection, "lagrangian": Lagrangian, "ramp": Ramp}
