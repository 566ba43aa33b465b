"""What the stages of DHA minimise, and what they remember (arXiv 2406.06567, Sec 4.2 and B.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headfuse.fusion.lagrangian import CONVERGED, Multipliers, fusion_loss, margin
from headfuse.fusion.operators import FusedProjection, head_losses
from headfuse.training.objectives import Losses, Objective

Projections = Sequence[tuple[FusedProjection, FusedProjection]]


class SearchObjective(nn.Module):
    """The Search: the loss alone drives the operators, the distances of heads are only measured (B.2).

    The distances are averaged over the last quarter of the steps, as single steps are noisy (P5). They are stored with
    the model, so that a resumed search ends with the same ones.
    """

    def __init__(self, base: Objective, projections: Projections, *, steps: int) -> None:
        super().__init__()
        self.base, self.projections = base, tuple(projections)
        self.measured = max(1, steps // 4)
        self.steps_left = steps
        self.steps = steps
        for index, pair in enumerate(self.projections):
            for kind, projection in zip(("keys", "values"), pair, strict=True):
                n = projection.num_heads
                self.register_buffer(f"{kind}_{index}", projection.weight.new_zeros(n, n, dtype=torch.float32))

    def forward(self, model: PreTrainedModel, tokens: Tensor) -> Losses:
        """The loss of the model."""
        return self.base(model, tokens)

    def before_step(self, step: int) -> None:
        """Take the number of the step that comes, counted from 0."""
        self.steps_left = self.steps - step

    @torch.no_grad()
    def after_step(self) -> None:
        """Measure the distances of heads, L_head."""
        if self.steps_left <= self.measured:
            for total, projection in zip(self._totals(), self._flat(), strict=True):
                total += head_losses(projection.expanded(), projection.allowed)

    def distances(self) -> list[tuple[Tensor, Tensor]]:
        """L_head of all pairs of key and of value heads at the end, by layer: `[n, n]` in fp64 on the CPU."""
        means = [total.double().cpu() / self.measured for total in self._totals()]
        return list(zip(means[::2], means[1::2], strict=True))

    def _totals(self) -> list[Tensor]:
        kinds = ("keys", "values")
        return [getattr(self, f"{kind}_{index}") for index in range(len(self.projections)) for kind in kinds]

    def _flat(self) -> list[FusedProjection]:
        return [projection for pair in self.projections for projection in pair]


class FusionObjective(nn.Module):
    """The Fusion: the loss, plus the multipliers times how far the heads of a group still disagree (Eq 8).

    The margin falls from 1 to 0 over the first `warmup` steps by `base ** step * (1 - step / warmup)`.
    """

    step: Tensor

    def __init__(
        self,
        base: Objective,
        projections: Projections,
        *,
        warmup: int,
        decay: float,
        per_term: bool = True,
        multipliers: int = 1,
        threshold: float = CONVERGED,
    ) -> None:
        """`decay` is what the exponential part of the margin comes to at the end of the warm-up."""
        super().__init__()
        self.base, self.projections = base, tuple(projections)
        self.warmup, self.margin_base = max(1, warmup), decay ** (1 / max(1, warmup))
        self.per_term, self.threshold = per_term, threshold
        self.multipliers = Multipliers(multipliers)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, model: PreTrainedModel, tokens: Tensor) -> Losses:
        """The loss with the constraint; logs the violation, the multiplier and the pair losses."""
        losses = self.base(model, tokens)
        now = margin(self.step, self.warmup, self.margin_base)
        kinds = [[pair[kind] for pair in self.projections] for kind in (0, 1)]
        terms = [fusion_loss(kind, now, per_term=self.per_term) for kind in kinds]
        constraint = self.multipliers(terms)
        logged = {
            "fusion": torch.stack([each.loss.detach() for each in terms]).sum(),
            "pair_mse": torch.stack([each.mean_mse for each in terms]).mean(),
            "pair_mse_max": torch.stack([each.max_mse for each in terms]).max(),
            "multiplier": self.multipliers.values.detach().float().mean(),
            "margin": now.float(),
        }
        return Losses(losses.total + constraint, losses.logged | logged)

    def after_step(self) -> None:
        """Count the step and keep the multipliers above zero."""
        self.step += 1
        self.multipliers.clamp()

    @torch.no_grad()
    def finished(self) -> bool:
        """Whether the margin is closed and the mean pair of heads agrees to the threshold."""
        if int(self.step) < self.warmup:
            return False
        flat = [projection for pair in self.projections for projection in pair]
        return fusion_loss(flat, 0.0).converged(self.threshold)
