"""DHA's constraint: heads of a group must come to agree, within a margin that closes (arXiv 2406.06567, Eq 7 and 8).

The multipliers climb while the model descends: they are a parameter group of `ascent`, as in LLM-Shearing (arXiv
2310.06694), the code base that DHA was built on, which gives them a negative rate.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headfuse.fusion.operators import FusedProjection

CONVERGED = 1e-3  # the paper's threshold of L_fusion, here of the mean pair


@dataclass(frozen=True)
class FusionTerms:
    """The fusion loss of some projections with its graph, and the detached pair losses that say how far it is."""

    loss: Tensor
    mean_mse: Tensor
    max_mse: Tensor

    def converged(self, threshold: float = CONVERGED) -> bool:
        """Whether the mean pair is below `threshold`. The paper's "L_fusion < 1e-3" does not say mean or sum.

        A sum over thousands of pairs would be far stricter; `max_mse` is there to be watched.
        """
        return self.mean_mse.item() < threshold


def margin(step: Tensor, warmup: int, base: float) -> Tensor:
    """`base ** step * (1 - step / warmup)`: from 1 to 0, and 0 from `warmup` on (Eq 8 and B.2.3); in fp64."""
    steps = step.double()
    return base**steps * (1 - steps / max(1, warmup)).clamp_min(0.0) * (steps < warmup)


def fusion_loss(
    projections: Iterable[FusedProjection], margin: Tensor | float, *, per_term: bool = True
) -> FusionTerms:
    """The excess of the pair losses over the margin, summed over projections and pairs, each pair once (Eq 7).

    The paper contradicts itself on the margin. `per_term` takes it off every pair, as its appendix B.2.3 does: a pair
    starts at 2 / g, so the constraint is off at first. Otherwise it is taken off the sum, as Eq 8 prints it, where a
    margin of at most 1 does nothing to a sum that starts in the thousands.
    """
    pairs = torch.cat([each.pair_losses() for each in projections])
    margin = torch.as_tensor(margin).to(pairs)
    loss = (pairs - margin).relu().sum() if per_term else (pairs.sum() - margin).relu()
    seen = pairs.detach() if len(pairs) else pairs.new_zeros(1)  # heads alone have no pairs and agree
    return FusionTerms(loss, seen.mean(), seen.max())


class Multipliers(nn.Module):
    """The Lagrange multipliers: one for all losses, or one each (as for keys and values); never negative.

    The paper says neither how many nor where they start: 1 is the implicit one of its B.2.3, LLM-Shearing starts at 0.
    """

    values: nn.Parameter

    def __init__(self, count: int = 1, *, initial: float = 1.0) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((count,), initial))

    def forward(self, terms: Sequence[FusionTerms]) -> Tensor:
        """Each loss times its multiplier, summed; a single multiplier serves them all."""
        losses = torch.stack([each.loss for each in terms])
        assert len(self.values) in (1, len(losses)), "as many multipliers as losses, or one"
        return (self.values.to(losses) * losses).sum()

    @torch.no_grad()
    def clamp(self) -> None:
        """Back to zero where a step went below; after every step."""
        self.values.clamp_(min=0.0)
